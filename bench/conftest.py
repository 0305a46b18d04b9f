"""Options of the benchmarks. `pytest bench/` runs all of them, `pytest bench/ -k quick` a short look."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounds-scale", type=float, default=1.0, help="multiply every count of rounds"
    )


@pytest.fixture
def rounds(request):
    scale = request.config.getoption("--rounds-scale")
    return lambda n: max(3, round(n * scale))


@pytest.fixture
def show(capsys):
    """Print past pytest's capture: a benchmark is run to be read."""

    def print_now(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return print_now
