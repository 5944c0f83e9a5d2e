"""Which way a server takes new weights while requests run, so that each token ends with the version that really sampled it. Pure.

What real servers did with a request of 600 tokens in flight (log-probs compared with both models):

| pause | flush | outcome |
|---|---|---|
| retract | yes, from 0.5.21 | clean: tokens before the swap are the old model's, tokens after it the new one's |
| retract | yes, before 0.5.21 | the server dies |
| retract | no, with --disable-radix-cache | clean |
| retract | no | mixed: the prefix cache of the old weights is used again |
| abort | either | partial tokens at once; the caller resumes with prompt + tokens |
| in_place | no | old cache under new weights: log-probs match neither |

Which version sampled which token is told by the server from 0.5.19 on; before, only requests that never cross a swap can be labelled.
"""

from __future__ import annotations

import re
from typing import Literal

from actors.engines.sglang_options import SwapPolicy
from protocol.errors import ConfigError

Swap = Literal["retract_flush", "retract", "abort_resume", "in_place"]

FLUSH_SINCE, SPANS_SINCE = (0, 5, 21), (0, 5, 19)


def parse_version(text: str) -> tuple[int, ...]:
    """ "0.5.15.post1" -> (0, 5, 15)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split("."))[:3] if found else ()


def choose_swap(policy: SwapPolicy, version: str, radix_cache: bool) -> Swap:
    """The way to use with a server of `version`. Raises ConfigError for one that this server would not survive, or could not label."""
    number = parse_version(version)
    flush, spans = number >= FLUSH_SINCE, number >= SPANS_SINCE
    if policy == "auto":
        return "retract_flush" if flush else "retract" if spans and not radix_cache else "abort_resume"
    if policy == "retract_flush" and not flush:
        raise ConfigError(f"swap is retract_flush, but SGLang {version} dies of it; it needs 0.5.21, use auto")
    if policy == "retract" and radix_cache:
        raise ConfigError(
            "swap is retract: the prefix cache of the old weights would be used again; start the server with disable-radix-cache"
        )
    if policy in ("retract", "in_place") and not spans:
        raise ConfigError(
            f"swap is {policy}, but SGLang {version} does not say which version sampled which token; it needs 0.5.19, use auto"
        )
    return policy
