"""`tvilfm gallery migrate --images`: the gallery of another model, from the images that its rows refer to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.cli.app import main
from cluster.tables.indexing import index
from tests.untrained_run import UntrainedRun, write_untrained_run
from tvilfm.config import resolve
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import vectors_of


def stored(gallery: Gallery) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Return the facts of all rows, and their raw features."""
    raw = pa.Table.from_batches(gallery.batches())["raw"]
    return gallery.facts().drop_columns("position").to_pylist(), vectors_of(raw).tolist()


@pytest.mark.slow
def test_images_are_encoded_again_for_a_model_with_another_backbone(
    untrained_run: UntrainedRun,
    tiny_benchmark: Path,
    ray_session: None,
    new_database: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, other = new_database(), new_database()
    config = write_untrained_run(tmp_path, tiny_benchmark, seed=1).config.model_dump(mode="json")
    old = index(resolve(untrained_run.config.model_dump(mode="json"), [f"gallery.url={url}"])).gallery
    expected = index(resolve(config, [f"gallery.url={other}"])).gallery

    def command(name: str, *options: str) -> tuple[int, str]:
        arguments = ["gallery", name, *options, "--size", "tiny", f"run.dir={tmp_path}", f"gallery.url={url}"]
        monkeypatch.setattr("sys.argv", ["tvilfm", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out + printed.err

    status, printed = command("migrate")
    assert status == 2 and "expected models with the same backbone" in printed
    status, printed = command("migrate", "--images", str(tiny_benchmark / "cam1"))
    some = sum("/cam1/" in row["image"] for row in old.facts().to_pylist())
    assert status == 0 and f"{some} written" in printed and f"{old.count() - some} rows refer to images" in printed
    assert old.in_use
    status, printed = command("migrate", "--images", f"{tiny_benchmark}/cam1/..")
    assert status == 0 and f"{some} skipped as existing" in printed
    new = Gallery.open(url)
    assert new.in_use and new.space_id == expected.space_id != old.space_id
    facts, raw = stored(new)
    assert facts == stored(old)[0]
    person = facts[0]["pid"]
    status, printed = command("delete", "--person", person)
    assert status == 0 and printed.count("images deleted") == 2
    assert all(person not in gallery.facts()["pid"].to_pylist() for gallery in Gallery.of_all_models(url))
    assert raw == [pytest.approx(row, abs=1e-5) for row in stored(expected)[1]]
