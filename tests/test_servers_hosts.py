"""The commands of the cluster on several machines, as far as they refuse."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from servers import cli, config

pytest.importorskip("msgspec")

ALONE = config.DEFAULT_FILE.read_text()
BRIDGED = ALONE
for number in (1, 2):
    segment = f'segment = "shm_host{number}"'
    BRIDGED = BRIDGED.replace(segment, f'{segment}\nbridge = ["tcp/127.0.0.1:5744{number}"]')


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (BRIDGED, ["up", "--host", "host9"], "no host 'host9'; hosts are host1, host2"),
        (BRIDGED, ["up"], "say which this is, --host host1 or --host host2"),
        (ALONE, ["up", "--host", "host1"], "host 'host1' has no bridge"),
        (ALONE, ["bridge", "host1"], "host 'host1' has no bridge"),
        (BRIDGED, ["bridge", "host9"], "host 'host9' has no bridge"),
        (BRIDGED + "[bridge]\nticks = 1\n", ["up", "--host", "host1"], "ticks"),
        (BRIDGED.replace("tcp/", "tls/"), ["up", "--host", "host1"], "needs certificates"),
    ],
)
def test_wrong_usage_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str], says: str
):
    async def started(*_: object) -> int:
        raise AssertionError("nodes were started")

    monkeypatch.setattr("servers.up.run_up", started)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere.example")
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    done = CliRunner().invoke(cli.main, [*words, "--config", str(file)])
    assert done.exit_code == 2, done.output
    assert says in done.output


def test_the_name_of_the_machine_says_which_host_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = []

    async def started(*arguments: object) -> int:
        given.append(arguments[-1])
        return 0

    monkeypatch.setattr("servers.up.run_up", started)
    monkeypatch.setattr("socket.gethostname", lambda: "host2.example")
    file = tmp_path / "cluster.toml"
    for text in (BRIDGED, ALONE):
        file.write_text(text)
        done = CliRunner().invoke(cli.main, ["up", "--config", str(file)])
        assert done.exit_code == 0, done.output
    assert given == ["host2", None]
