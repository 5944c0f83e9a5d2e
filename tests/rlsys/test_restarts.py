"""When what died comes back, and when the run ends instead."""

from __future__ import annotations

from rlsys.restarts import GiveUp, Restart, RestartPolicy, RestartSettings


def policy(**changes: float) -> RestartPolicy:
    return RestartPolicy(RestartSettings(**{"generator": 3, "window_s": 100.0, "backoff_s": 1.0, "max_backoff_s": 3.0, **changes}))


def test_the_pause_doubles_up_to_its_limit_and_deaths_are_forgotten() -> None:
    p = policy()
    assert [p.died("generator-0", "generator", t, "killed", "") for t in (0, 1, 2)] == [Restart(1.0), Restart(2.0), Restart(3.0)]
    assert p.died("generator-1", "generator", 2, "killed", "") == Restart(1.0), "each process counts for itself"
    assert p.died("generator-0", "generator", 200, "killed", "") == Restart(1.0)


def test_beyond_the_limit_the_run_ends_with_the_first_cause() -> None:
    p = policy()
    for t in range(3):
        p.died("generator-0", "generator", t, f"cause {t}", "")
    verdict = p.died("generator-0", "generator", 3, "cause 3", "")
    assert verdict == GiveUp("generator-0 died 4 times within 100 s, restarts.generator allows 3; first: cause 0; now: cause 3")


def test_zero_means_never() -> None:
    assert policy(generator=0).died("generator-0", "generator", 0, "it was killed", "") == GiveUp("it was killed")


def test_the_same_error_twice_is_a_bug_that_no_restart_mends() -> None:
    p = policy()
    assert isinstance(p.died("generator-0", "generator", 0, "it ended", "KeyError: 'x'"), Restart)
    assert isinstance(p.died("generator-0", "generator", 1, "it ended", "KeyError: 'y'"), Restart)
    verdict = p.died("generator-0", "generator", 2, "it ended", "KeyError: 'y'")
    assert verdict == GiveUp("it ended; the same as before its restart")
