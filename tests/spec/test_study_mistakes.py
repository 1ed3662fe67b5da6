"""What a study file may not say: numbers that would spoil or waste a study, and files that are something else."""

import pytest
from ruamel.yaml import YAML

from tests.spec.test_studyfile import GOOD, write
from tuner.errors import UsageError
from tuner.spec import studyfile

FLOOR = "objective: {latency: tpot_p99, slo: {tpot_p99: 50ms}, quality: {%s}}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "seed: -1\n", "seed"),
        ("", f"seed: {2**32}\n", "seed"),
        ("", "price_usd_per_gpu_hour: 0\n", "price per GPU-hour must be above zero"),
        ("", "price_usd_per_gpu_hour: .nan\n", "price per GPU-hour must be above zero"),
        ("", "price_usd_per_gpu_hour: {H100-SXM: .inf}\n", "price per GPU-hour must be above zero"),
        ("launches: 5", "hours: .inf", "budget.hours must be a number above zero"),
        ("launches: 5", "usd: .nan", "budget.usd must be a number above zero"),
        ("window: 10s", "window: 10s, heldout_windows: 1000000000", "1 to 1000 search windows"),
        ("window: 10s", "window: 10s, max_input_tokens: -1", "trace.max_input_tokens is from 1 to 10,000,000"),
        ("window: 10s", f"window: 10s, max_output_tokens: {10**26}", "trace.max_output_tokens is from 1 to"),
        ("window: 10s", "window: 5s", "the warm-up (5 s) leaves nothing of a window of 5 s"),
        (
            "ladder: [1, 2, 4]",
            "ladder: [1, 2, 4], warmup: 20s",
            "the warm-up (20 s) leaves nothing of a window of 10 s",
        ),
        ("./model", f"./{'x' * 300}", "does not exist"),
        ("./model", "~nobody-of-that-name/x", "write the folder out"),
        ("trace.csv", "y" * 300, "no such trace file"),
        ("objective: chat", f"objective: {'z' * 300}", "no objective named"),
        ("vllm/quick", "q" * 300, "no search space named"),
        (
            "kind: emulator,",
            "kind: emulator, args: {max-num-seqs: .inf},",
            "--max-num-seqs: no server takes inf",
        ),
        ("objective: chat", FLOOR % "top1_min: 95", "quality.top1_min is a share from 0 to 1, not 95"),
        ("objective: chat", FLOOR % "greedy_min: -1", "quality.greedy_min is a share from 0 to 1, not -1"),
        ("objective: chat", FLOOR % "kl_max: .nan", "quality.kl_max is nats per token, 0 or more, not nan"),
        ("objective: chat", FLOOR % "kl_max: .inf", "quality.kl_max is nats per token, 0 or more, not inf"),
        ("{launches: 5}", "-3", "bad budget '-3'"),
        ("", "warm_start: [../gone]\n", ":9: warm_start: no study in ../gone"),
    ],
)
def test_what_would_spoil_a_study_is_refused_with_its_place(workplace, old, new, says):
    text = GOOD.replace(old, new) if old else GOOD + new
    with pytest.raises(UsageError) as error:
        studyfile.load(write(workplace, text))
    assert says in str(error.value) and str(error.value).startswith(str(workplace / "study.yaml"))


def test_a_number_alone_is_a_budget_of_launches(workplace):
    assert studyfile.load(write(workplace, GOOD.replace("{launches: 5}", "20"))).budget.launches == 20


def test_a_study_that_was_begun_with_all_warm_up_can_still_be_read(workplace, tmp_path):
    study = studyfile.load(write(workplace, GOOD))
    folder = tmp_path / "begun"
    folder.mkdir()
    with (folder / "study.yaml").open("w") as file:
        load = {**study.frozen["load"], "warmup": "1min"}
        YAML().dump({**study.frozen, "load": load, "warm_start": ["gone"]}, file)
    assert studyfile.load(folder).load.warmup_s == 60


def test_a_copy_of_a_study_folders_file_is_no_study_of_its_own(workplace):
    """It would take the folder it lies in for its own, and write its study.yaml over the user's."""
    study = studyfile.load(write(workplace, GOOD))
    with (workplace / "copy.yaml").open("w") as file:
        YAML().dump(dict(study.frozen), file)
    with pytest.raises(UsageError, match=r"copy.yaml:\d+: a copy of a study folder's own file"):
        studyfile.load(workplace / "copy.yaml")


def test_lists_in_lists_without_end_are_no_study(tmp_path):
    with pytest.raises(UsageError, match="nested too deeply"):
        studyfile.load(write(tmp_path, "[" * 100_000))
