"""digits-skip in miniature: its sets, its rows, and what a run writes."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from test_vqa_demo import MINIATURE, small_bert

from fast_prompt import cli
from fast_prompt.demo.vqa import language, skipping
from fast_prompt.demo.vqa.skipping import SkipSettings, configs
from fast_prompt.methods.das import DASConfig

SMALL = SkipSettings(**asdict(MINIATURE) | {"layer": 1, "num_skipped": 1, "skip_width": 6, "reward_every": 1})


@pytest.fixture(scope="module", autouse=True)
def small():
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(language, "pretrained", lambda: small_bert(layers=3))
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("skip")
    return directory, skipping.run(directory, seed=3, settings=SMALL)


def test_rows_compare_the_found_set_with_others(finished):
    directory, results = finished
    written = json.loads((directory / "results.json").read_text())
    assert written == json.loads(json.dumps(results.to_dict()))
    names = [row["method"] for row in written["rows"]]
    assert names[:2] == ["None skipped", "Found"]
    assert set(names[2:]) <= {"Random", "Last"}
    for name, skipped in written["facts"]["skipped"].items():
        assert len(skipped) == (0 if name == "None skipped" else 1)
    assert written["facts"]["skipped"]["Last"] == [2] if "Last" in names else True


def test_skipping_saves_arithmetic_and_memory(finished):
    rows = {row.method: row for row in finished[1].rows}
    assert rows["None skipped"].added_macs == 0
    assert rows["Found"].added_macs < 0
    parameters = finished[1].facts["parameters"]
    block = sum(each.numel() for each in small_bert(layers=3).encoder.layer[0].parameters())
    assert parameters["whole"] - parameters["compact"] == block


def test_the_reloaded_adapter_predicts_the_same(finished):
    reload = finished[1].reload
    assert (reload.method, reload.tests, reload.equal_predictions, reload.exact) == ("Found", 60, 60, True)


def test_pictures_are_written(finished):
    directory, results = finished
    for name in results.pictures:
        with Image.open(directory / name) as image:
            assert image.width > 600


def test_every_method_is_in_every_row():
    methods = [part.method for part in configs(SMALL, 5, ["encoder.layer.0"])]
    assert methods == ["DVP", "APT", "DAS"]
    searched = configs(SMALL, 5, None)[2]
    assert isinstance(searched, DASConfig) and searched.skipped is None


def test_it_has_nothing_to_search_besides(tmp_path, capsys):
    assert cli.main(["demo", "--task", "digits-skip", "--search", "--output", str(tmp_path)]) == 2
    assert "--search" in capsys.readouterr().err
