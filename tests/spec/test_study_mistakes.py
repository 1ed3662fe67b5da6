"""What a study file may not say: numbers that would spoil or waste a study, and files that are something else."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.spec.test_studyfile import GOOD, write
from tuner.errors import UsageError
from tuner.spec import studyfile
from tuner.spec.spacefile import off
from tuner.study import workload

SPACE = "{parameters: {x: {flag: max-num-seqs, values: %s, default: a}}}"
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
        ("launches: 5", "min_gain: 1", ":8: budget.min_gain is a share such as 0.3%, from 0 to below 1, not 1"),
        ("launches: 5", "min_gain: some", ":8: budget.min_gain is a share such as 0.3%"),
        ("launches: 5", "min_gain: -1%", ":8: budget.min_gain is a share such as 0.3%"),
        ("launches: 5", "min_gain: 0.3", ":8: budget.min_gain: 0.3 is 30% of the front. write for example 0.3%"),
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
        ("trace.csv", "y" * 300, "or make one like Azure's: tuner trace synth"),
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
        ("{launches: 5}", "nan usd", ":8: bad budget 'nan usd'"),
        ("{launches: 5}", "inf usd", ":8: bad budget 'inf usd'"),
        ("{launches: 5}", "'1.5'", ":8: bad budget '1.5'"),
        ("window: 10s", "window: 1.2.3s", ":6: trace.window: bad duration '1.2.3s'"),
        ("ttft_p99: 300ms", "ttft_p99: 1.2.3ms", ":5: bad limit '1.2.3ms'"),
        ("objective: chat", "objective: {latency: tpot_p9, slo: {}}", ":4: tpot_p9 lets 91 % of the requests"),
        ("", "price_usd_per_gpu_hour: {L4: 1, l4: 2}\n", ":9: l4: L4 has a price already"),
        ("", "price_usd_per_gpu_hour: {X100: 2}\n", ":9: a price of an unknown GPU 'X100'. Did you mean 'V100'?"),
        ("budget: {launches: 5}", "budget:", ":8: budget is empty. write a value, or leave the entry out"),
        ("{launches: 5}", "{verify_share: }", ":8: budget.verify_share is empty. write a value"),
        ("load: {ladder: [1, 2, 4]}", "load: fast", ":7: load: keys and values are wanted here, not 'fast'"),
        ("", "executor: rai\n", ":9: executor: input should be 'local' or 'ray'. Did you mean 'ray'?"),
        ("", "parallel: some\n", "unable to parse string as an integer, or 'auto'"),
        ("[1, 2, 4]", "2", ":7: load.ladder: input should be a valid list, or 'auto'"),
        (
            "kind: emulator,",
            "kind: emulator, args: {speculative-config: {method: ngram}},",
            ":2: engine.args.speculative-config: one value is wanted here, not {'method': 'ngram'}. write the parts "
            "one by one: speculative-config.method: VALUE",
        ),
        (
            "gpu: H100-SXM",
            "gpu: H100-SXM, phase_limit_s: {wieghts: 60}",
            ":2: phase_limit_s: there is no phase 'wieghts'. Did you mean 'weights'?",
        ),
        ("kind: emulator,", "kind: emulator, args: {a: [1]},", ":2: engine.args.a: one value is wanted here, not [1]"),
        ("vllm/quick", SPACE % "{a: 1}", ":3: search_space.parameters.x.values.a: keys and values are wanted here"),
        ("vllm/quick", SPACE % "{a: {flgs: {}}}", ":3: unknown key 'flgs'. Did you mean 'flags'?"),
        ("trace.csv,", "trace.csv, format: csvv,", ":6: there is no trace format 'csvv'"),
        ("", "frozen: {beside: .}\n", ":9: frozen.facts is missing"),
        ("", "frozen: {beside: ., facts: {}, hardware: {name: x}}\n", ":9: frozen.hardware.gpus is missing"),
        (
            "",
            "tracking_uri: ./mlruns\n",
            ":9: MLflow keeps no runs in files any more, as tracking_uri ./mlruns",
        ),
        ("", "tracking_uri: file:///x/mlruns\n", "write sqlite:///mlflow.db, or a server's http://HOST:5000"),
        ("", "parameters: {max_num_seqs: 64.5}\n", ":9: max_num_seqs has whole numbers as values, not 64.5"),
        ("", "parameters: {max_num_seqs: [64, -5]}\n", ":9: max_num_seqs has whole numbers as values, not -5"),
        ("objective: chat", (FLOOR % "")[:-1] + ", price_usd_per_gpu_hour: -1}", ":4: the price per GPU-hour must be"),
        ("chat\nslo: {ttft_p99: 300ms}", "{latency: e2e_p90, slo: {error_rate: 1%}}", ":4: no SLO is on a latency"),
        ("", "parameters: {max_num_seqs: '64'}\n", ":9: max_num_seqs has no value '64'. write 64 without quotes"),
    ],
)
def test_what_would_spoil_a_study_is_refused_with_its_place(workplace, old, new, says):
    text = GOOD.replace(old, new) if old else GOOD + new
    with pytest.raises(UsageError) as error:
        studyfile.load(write(workplace, text))
    assert says in str(error.value) and str(error.value).startswith(str(workplace / "study.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("objective: chat", FLOOR % "kl_max: false", "4: objective.quality.kl_max: false"),
        ("{launches: 5}", "true", "8: budget: true"),
        ("{launches: 5}", "{hours: true}", "8: budget.hours: true"),
        ("[1, 2, 4]", "[true]", "7: load.ladder.0: true"),
        ("ttft_p99: 300ms", "error_rate: false", "5: slo.error_rate: false"),
        ("window: 10s", "window: true", "6: trace.window: true"),
        ("objective: chat", "price_usd_per_gpu_hour: true", "4: price_usd_per_gpu_hour: true"),
        ("objective: chat", "hardware: {gpus: true}", "4: hardware.gpus: true"),
        ("objective: chat", "parallel: true", "4: parallel: true"),
        ("objective: chat", "seed: false", "4: seed: false"),
    ],
)
def test_true_and_false_are_no_numbers(workplace, old, new, place):
    with pytest.raises(UsageError) as error:
        studyfile.load(write(workplace, GOOD.replace(old, new)))
    assert str(error.value).startswith(f"{workplace}/study.yaml:{place} is no number: write one")


def test_a_study_that_was_begun_with_such_values_can_still_be_read(workplace, tmp_path):
    frozen = dict(studyfile.load(write(workplace, GOOD)).frozen)
    engine = {**frozen["engine"], "args": {"enforce-eager": False, "max-num-seqs": 1.0}, "env": {"A.B": True}}
    objective = {**frozen["objective"], "latency": "tpot_p9", "quality": {"kl_max": False}, "slo": {}}
    space = {**frozen["search_space"], "fixed": {"max-num-seqs": 8, "x": False}, "parameters": {}, "rules": []}
    more = {"engine": engine, "objective": objective, "search_space": space, "budget": "nan usd"}
    (tmp_path / "begun").mkdir()
    with (tmp_path / "begun" / "study.yaml").open("w") as file:
        YAML().dump({**frozen, **more}, file)
    study = studyfile.load(tmp_path / "begun")
    assert (study.space.fixed, study.space.env) == ({"max-num-seqs": 8}, {"A.B": "1"})
    assert study.objective.quality.kl_max == 0 and study.budget.usd is None


@pytest.mark.parametrize(
    ("kind", "flag", "fix"),
    [
        ("vllm", "enable-prefix-caching", "of a switch write no-enable-prefix-caching: true; else leave it out"),
        ("emulator", "no-enable-chunked-prefill", "of a switch write enable-chunked-prefill: true; else leave it out"),
        ("vllm", "compilation-config.use_cudagraph", 'write compilation-config.use_cudagraph: "false", in quotes'),
        ("vllm", "disable-log-stats", "leave it out"),
        ("sglang", "enable-mixed-chunk", "leave it out"),
        ("function", "use-cache", "leave it out"),
    ],
)
def test_how_a_switch_is_off_is_said_as_the_engine_has_it(kind, flag, fix):
    assert off(flag, kind) == fix


@pytest.mark.parametrize("said", ["20", "20.0", "'20'", "'20.0'", "20 launches"])
def test_a_number_alone_is_a_budget_of_launches(workplace, said):
    assert studyfile.load(write(workplace, GOOD.replace("{launches: 5}", said))).budget.launches == 20


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("args: {max_model_len: 2048, max-model-len: 1024}", "--max-model-len is given twice"),
        ("args: {enable-prefix-caching: false}", "--enable-prefix-caching: false adds no flag"),
        ("args: {max-model-len: 1e3}", "max-model-len: 1e3 would be passed on as 1000.0"),
        ("args: {revision: 0123456}", "revision: 0123456 would be passed on as 123456"),
        ("env: {A=B: x}", "'A=B' is no name of an environment variable"),
        ("env: {X: 010}", 'X: 010 would be passed on as 10. quote it: "010"'),
        ("env: {X: 1.10}", 'X: 1.10 would be passed on as 1.1. quote it: "1.10"'),
        ("env: {X: true}", "engine.env.X: true is no text: quote it"),
        ('env: {X: "a\\0b"}', "X: no server can be given a NUL"),
        ('args: {x: "a\\0b"}', "x: no server can be given a NUL"),
    ],
)
def test_what_no_server_would_get_as_it_stands_is_refused(workplace, said, says):
    with pytest.raises(UsageError) as error:
        studyfile.load(write(workplace, GOOD.replace("kind: emulator,", f"kind: emulator, {said},")))
    assert str(error.value).startswith(f"{workplace}/study.yaml:2: {says}")


def test_numbers_are_passed_on_as_they_are_meant(workplace):
    said = "args: {gpu-memory-utilization: 0.90, x: 1e-5, on: &on true, off: *on}, env: {X: 1.5, Y: '010', Z: 3}"
    engine = studyfile.load(write(workplace, GOOD.replace("kind: emulator,", f"kind: emulator, {said},"))).space
    assert engine.fixed == {"gpu-memory-utilization": 0.9, "x": 1e-5, "on": None, "off": None}
    assert engine.env == {"X": "1.5", "Y": "010", "Z": "3"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"model: a\nname: \xe9\n", "2: this study file is not UTF-8 text. save it as UTF-8"),
        (b"model: a\nname: \0\n", "2: this is not valid YAML: special characters are not allowed"),
        (b"model: a\nload: {1: a, '1': b}\n", "2: this is not valid YAML: the key '1' is there twice"),
    ],
)
def test_what_is_no_text_is_told_with_its_line(tmp_path, text, says):
    (path := tmp_path / "study.yaml").write_bytes(text)
    with pytest.raises(UsageError) as error:
        studyfile.load(path)
    assert str(error.value) == f"{path}:{says}"


def test_aliases_of_aliases_are_not_written_out(tmp_path):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    with pytest.raises(UsageError, match="more than 200,000 entries"):
        studyfile.load(write(tmp_path, "\n".join(lines)))


@pytest.mark.filterwarnings("error")
def test_an_anchor_may_be_defined_anew(workplace):
    text = GOOD.replace("{launches: 5}", "{launches: &n 5}\nseed: &n 7\nparallel: *n")
    assert studyfile.load(write(workplace, text)).parallel == 7


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


def test_a_file_that_nobody_wrote_by_hand_is_refused_before_it_is_read(tmp_path):
    rows = "".join(f"{i * 0.25},100,10\n" for i in range(100_000))  # a trace: as YAML it takes seconds and gigabytes
    path = write(tmp_path, "arrival_s,input_tokens,output_tokens\n" + rows, "traffic.csv")
    with pytest.raises(UsageError) as error:
        studyfile.load(path)
    assert str(error.value) == f"{path}: more than 1 MiB is no study file. Is it a trace? Name the YAML file"
    with pytest.raises(UsageError, match="more than 1 MiB"):
        studyfile.load(Path("/dev/zero"))


def test_a_link_to_nothing_is_not_suggested_in_its_own_place(tmp_path):
    (tmp_path / "study.yaml").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError) as error:
        studyfile.load(tmp_path / "study.yaml")
    assert str(error.value) == f"{tmp_path}/study.yaml: no such study file"


def test_an_engine_of_ones_own_needs_no_slo(workplace):
    text = GOOD.replace("objective: chat\nslo: {ttft_p99: 300ms}", "objective: {latency: e2e_p90, slo: {}}")
    own = "engine: {kind: own, target: mine.py:Engine}"
    study = studyfile.load(write(workplace, text.replace("engine: {kind: emulator, options: {gpu: H100-SXM}}", own)))
    assert study.objective.slos == ()
    assert not any("few requests" in note for note in workload.read(study).notes)
