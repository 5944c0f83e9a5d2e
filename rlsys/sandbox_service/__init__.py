"""`rlsys sandbox serve`: the sandbox as an authenticated HTTP service, for reward actors far from the GPUs and for other trainers.

`api.py` is what crosses the wire, and the OpenAPI document made of it; `server.py` is the process; `command.py` reads the command line.
"""
