"""Everything with gradients. Never imports `actors`. This file imports nothing, so that `learner.settings` needs no torch."""
