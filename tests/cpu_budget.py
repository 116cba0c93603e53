"""CPU time of a run of the tests, against what it may use.

    CPU time = user + system, of this process, of its workers, and of the commands that tests start

The kernel adds a process to its parent's account when the parent has waited for it: tests wait for their commands, and
pytest-xdist for its workers. Unlike the time on the clock, it hardly depends on what else the machine does.
"""

import os
import resource

import pytest

_USED = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addini("cpu_budget_s", "CPU time in seconds that a run of all tests may use; CI fails beyond it")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session):
    """Measures the CPU time after the workers have ended; in CI a run of all tests beyond the budget fails."""
    yield
    if not hasattr(session.config, "workerinput"):
        session.config.stash[_USED] = sum(map(_cpu_time_s, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        if _is_over(session.config) and _is_checked(session.config) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if _USED not in config.stash:
        return
    line = f"CPU time: {config.stash[_USED]:.1f} s of {_allowed_s(config):g} allowed"
    if _is_over(config) and _is_checked(config):
        terminalreporter.write_line(f"{line}: too much", red=True)
    elif _is_over(config):
        terminalreporter.write_line(f"{line}: too much; a run of all tests with CI=true would fail", yellow=True)
    else:
        terminalreporter.write_line(line)


def _cpu_time_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _allowed_s(config) -> float:
    return float(config.getini("cpu_budget_s") or "inf")


def _is_over(config) -> bool:
    return config.stash[_USED] > _allowed_s(config)


def _is_checked(config) -> bool:
    """Whether the budget applies: in CI, to a run of all tests."""
    chosen = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "ignore"))
    is_whole = config.args_source is config.ArgsSource.TESTPATHS and not chosen
    return is_whole and os.environ.get("CI", "").lower() in ("true", "1")
