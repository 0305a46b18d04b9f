"""How far a run is: redrawn on a terminal, a line a minute elsewhere, nothing where that is asked."""

import io
import logging
import warnings

import pytest

from fastspec import cli, progress
from fastspec.studies import encoders


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def use(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return use


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, for tqdm."""
    now = [1e6]
    monkeypatch.setattr("tqdm.tqdm._time", lambda self: now[0], raising=False)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def run(steps, clock, seconds, **options):
    with progress.bar(steps, "work", "step", **options) as bar:
        for i in range(steps):
            clock[0] += seconds
            bar.set_postfix(loss=f"{i}", refresh=False)
            bar.update()


def test_elsewhere_it_is_a_line_a_minute(stderr, clock):
    stream = stderr(io.StringIO())
    run(50, clock, 10)
    lines = stream.getvalue().splitlines()
    assert 6 <= len(lines) <= 9, "500 seconds"
    assert all(line.startswith("work:") for line in lines)
    assert "\r" not in stream.getvalue()
    assert "loss=" in lines[-1]


def test_a_short_run_says_nothing_elsewhere(stderr, clock):
    stream = stderr(io.StringIO())
    run(50, clock, 0.1)
    assert stream.getvalue() == ""


def test_on_a_terminal_it_redraws(stderr, clock):
    stream = stderr(Terminal())
    run(50, clock, 1)
    assert stream.getvalue().count("\r") > 10


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet(stderr, clock, stream):
    stream = stderr(stream())
    with progress.shown("quiet"):
        run(50, clock, 60)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("flags", "level"), [([], "normal"), (["--quiet"], "quiet"), (["--verbose"], "verbose")]
)
def test_flags_of_every_command(monkeypatch, flags, level):
    seen = []
    module = type("Command", (), {})()
    module.add_arguments = lambda parser: None
    module.main = lambda args: seen.append(progress.level()) or 0
    monkeypatch.setattr(cli.importlib, "import_module", lambda path: module)
    for command in cli.COMMANDS:
        assert cli.main([command, *flags]) == 0
    assert set(seen) == {level}
    assert progress.level() == "normal"
    with pytest.raises(SystemExit):
        cli.main(["backends", "--quiet", "--verbose"])


def test_verbose_lets_other_libraries_speak():
    pytest.importorskip("transformers")
    logger = logging.getLogger("torchao")

    def spoken():
        with encoders.quiet(), warnings.catch_warnings(record=True) as found:
            warnings.warn_explicit("will change", FutureWarning, "x.py", 1, module="peft.tuners")
            return len(found), logger.isEnabledFor(logging.WARNING)

    assert spoken() == (0, False)
    with progress.shown("verbose"):
        assert spoken() == (1, True)
