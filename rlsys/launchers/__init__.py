"""Launchers: how a process of a run is started and watched. `local` starts children of the supervisor on this host."""
