"""The runs that the README quotes are kept, as bench/README.md describes them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUOTED = sorted(set(re.findall(r"bench/results/\w+\.json", (ROOT / "README.md").read_text())))


def test_the_readme_quotes_a_run():
    assert QUOTED


@pytest.mark.parametrize("name", QUOTED)
def test_quoted_runs_are_whole(name):
    path = ROOT / name
    result = json.loads(path.read_text())
    assert {"gpu", "date", "commit", "ceilings", "rows"} <= result.keys()
    assert result["ceilings"] and result["rows"]
    for row in result["rows"]:
        assert {"op", "shape", "median_us", "peers", "tflops", "gbps"} <= row.keys(), row["op"]
    assert path.with_suffix(".svg").exists() and path.with_suffix(".png").exists()
