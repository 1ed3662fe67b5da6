import html
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import studies
from tuner.export.formats import best_config
from tuner.record.note import markdown
from tuner.report.figures import front_svg
from tuner.report.html import script_json
from tuner.report.page import build
from tuner.report.parallel import _short
from tuner.report.summary import summarize
from tuner.report.tables import unserved
from tuner.report.terminal import front_table
from tuner.spec.study import EngineSpec
from tuner.study.outcome import Aborted, Infeasible, Measured, Untrusted
from tuner.study.store import Store, write_json

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Outline(HTMLParser):
    """Checks that elements nest, and keeps the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text())
    outline.close()
    assert outline.open == []
    return outline


def page(tmp_path: Path, **kwargs) -> tuple[Path, Outline]:
    study, store = studies.write(tmp_path / "s", **kwargs)
    path = build(store, study, tmp_path / "report.html")
    return path, read(path)


def figures(path: Path) -> dict:
    return json.loads(re.search(r'id="figures">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_page_needs_no_network_and_forbids_itself_any(tmp_path: Path):
    path, outline = page(tmp_path, trials=10)
    text = path.read_text()
    assert outline.loads == []
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text.split("</style>")[0]
    assert text.count("plotly.js v") == 1  # the library is in the file, once
    assert "cdn.plot.ly" not in text.split('id="figures">')[0]


def test_the_recommendation_is_in_words_and_figures_with_its_difference_to_the_default(tmp_path: Path):
    _, outline = page(tmp_path, trials=24)
    assert "Trial 19 (max-num-batched-tokens=8192 kv-cache-dtype=fp8 no-enable-prefix-caching)" in outline.text
    assert "$0.429 per million output tokens within SLO" in outline.text
    assert "−25.6 % −28.6 to −22.3 % against the engine's default" in outline.text
    assert "no-enable-prefix-caching: true" in outline.text and "vllm serve --config best-config.yaml" in outline.text
    assert "search measurement, not verified" in outline.text


def test_the_front_figure_holds_every_load_point_with_its_uncertainty_and_its_config(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24)
    traces = {t["name"]: t for t in figures(build(store, study, tmp_path / "r.html"))["front"]["data"]}
    s = summarize(store, study)
    shown = {(x, y) for t in traces.values() for x, y in zip(t["x"], t["y"], strict=True)}
    assert shown == {(p.cost, p.latency * 1e3) for p in s.points}
    assert traces["front"]["x"] == [p.cost for p in s.front]
    assert traces["front"]["error_x"]["array"][0] == pytest.approx(s.front[0].cost_interval[1] - s.front[0].cost)
    assert "max-num-batched-tokens=8192" in traces["recommended"]["hovertext"][0]
    assert all("SLO" in name or name in ("front", "engine's default", "recommended") for name in traces)


def test_every_latency_slo_has_its_curves_and_its_limit(tmp_path: Path):
    path, outline = page(tmp_path, trials=10)
    found = figures(path)
    assert "TPOT p99 against load" in outline.text and "TTFT p99 against load" in outline.text
    limits = [found[name]["layout"]["shapes"][0]["y0"] for name in ("curve0", "curve1")]
    assert limits == [50.0, 500.0]
    assert any("engine default" in trace["name"] for trace in found["curve0"]["data"])


def test_one_trial_is_enough(tmp_path: Path):
    path, outline = page(tmp_path, trials=1)
    assert "nothing measured is proven to be better" in outline.text
    assert "Too few configurations met the SLOs to say: 1; it takes 8" in outline.text
    assert "parallel" not in figures(path) and "against the engine's default" not in outline.text


def test_no_trial_at_all_is_a_page_too(tmp_path: Path):
    _, outline = page(tmp_path, trials=0)
    assert "No trial has finished yet" in outline.text and "No load point was measured" in outline.text


def test_nothing_feasible_names_what_came_nearest(tmp_path: Path):
    _, outline = page(tmp_path, trials=8, slow=10)
    assert "Nearest: trial" in outline.text and "No load point met every SLO" in outline.text
    assert "best-config.yaml" not in outline.text


def test_only_failures_are_a_page_too(tmp_path: Path):
    store = Store(tmp_path / "s")
    studies.add(0, Infeasible("oom-kv", "no room"), store, baseline=True)
    outline = read(build(store, studies.study(tmp_path / "s"), tmp_path / "r.html"))
    assert "No configuration was measured: 1 x oom-kv" in outline.text


def test_two_hundred_trials_stay_one_readable_file(tmp_path: Path):
    path, outline = page(tmp_path, trials=200)
    assert path.stat().st_size < 8e6
    assert "All 200" in outline.text


def test_an_emulated_study_carries_a_banner_and_a_measured_one_none(tmp_path: Path):
    study, store = studies.write(tmp_path / "e", trials=3, emulated=True, engine=EngineSpec("emulator"))
    assert "Nothing here was measured on a real server" in read(build(store, study, tmp_path / "e.html")).text
    _, outline = page(tmp_path, trials=3)
    assert "Emulated" not in outline.text


def test_failures_show_their_evidence_and_fix_and_refusals_their_reason(tmp_path: Path):
    _, outline = page(tmp_path, trials=16)
    assert "oom-kv 2 × start-up" in outline.text and "3.1 GiB KV cache is needed" in outline.text
    assert "Fix: lower max-model-len or raise gpu-memory-utilization" in outline.text
    assert "3 fewer batched tokens than sequences" in outline.text


def test_what_no_launch_says_is_said(tmp_path: Path):
    store, study = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    step = studies.step(1.0, study.objective)
    studies.measured(0, (step,), store, baseline=True)
    studies.add(1, Infeasible("crash", "no"), store, params={"kv_cache_dtype": "fp8", "draft_tokens": 8})
    studies.add(2, Infeasible("crash", "no"), store, params={"kv_cache_dtype": "fp8", "max_num_seqs": 64})
    studies.add(3, Untrusted(("late",), (step,)), store, params={"max_num_seqs": 128})
    studies.add(4, Aborted("interrupted"), store, params={"max_num_seqs": 512})
    rows = {name: rest for name, *rest in unserved(summarize(store, study))}
    assert rows["kv_cache_dtype"] == ["", "fp8 (2)"]
    assert rows["max_num_seqs"] == ["512", "64 (1)"]
    assert rows["draft_tokens"] == ["2, 4, 8", ""], "it applies with speculation alone"
    assert "What no trial says" in read(build(store, study, tmp_path / "r.html")).text
    assert unserved(summarize(Store(tmp_path / "none"), study)) == []


def test_where_nothing_served_no_value_is_suspected(tmp_path: Path):
    store, study = Store(tmp_path / "s"), studies.study(tmp_path / "s")
    for number, params in enumerate([{}, {"max_num_seqs": 512}, {"max_num_seqs": 128}, {"kv_cache_dtype": "fp8"}]):
        studies.add(number, Infeasible("crash", "no"), store, params, baseline=not number)
    text = read(build(store, study, tmp_path / "r.html")).text
    assert "4 trials" in text or "crash" in text
    assert "Suspected where" not in text


def test_a_command_is_shown_as_one(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=12, verified=True)
    verdict = json.loads((store.folder / "verify.json").read_text())
    command = "tuner tune reports/s --budget '12 launches' --verify-share 0.5"
    verdict["text"] += f"\n\nTo settle it, 2 launches more (about 4 min and $0.17): {command}"
    (store.folder / "verify.json").write_text(json.dumps(verdict))
    page = build(store, study, tmp_path / "r.html").read_text()
    assert f"<pre>{html.escape(command, quote=True).replace('&#x27;', '&#39;')}</pre>" in page


def test_what_failed_launches_have_in_common_is_said(tmp_path: Path):
    store, known = Store(tmp_path / "s"), studies.space()
    grid = [known.snap(params) for params in known.grid()]
    some = [known.snap(known.default()), *random.Random(3).sample(grid, 50)]
    for number, params in enumerate(some):
        fails = params["kv_cache_dtype"] == "fp8" and params["max_num_seqs"] >= 256
        config = known.config(params, "m")
        outcome = (
            Infeasible("no-kernel", "no kernel for it", "RuntimeError: no kernel", "take it out")
            if fails
            else studies.outcome_of(1, config, studies.objective(), random.Random(number), 1.0)
        )
        studies.add(number, outcome, store, params, baseline=not number)
    outline = read(build(store, studies.study(tmp_path / "s"), tmp_path / "r.html"))
    assert "Suspected where" in outline.text
    said = outline.text.partition("Suspected where ")[2][:80]
    assert "kv_cache_dtype = fp8" in said and "max_num_seqs >= 256" in said and "%)" in said


def test_one_cause_in_two_wordings_is_two_failures_and_figures_make_none(tmp_path: Path):
    store = Store(tmp_path / "s")
    for number, said in enumerate(("needs 3.1 GiB", "needs 4 GiB", "no kernel")):
        studies.add(number, Infeasible("infeasible", said), store, baseline=not number)
    outline = read(build(store, studies.study(tmp_path / "s"), tmp_path / "r.html"))
    assert "infeasible 2 × start-up needs 3.1 GiB" in outline.text
    assert "infeasible 1 × start-up no kernel" in outline.text


def test_an_example_that_stands_for_many_refusals_counts_as_many(tmp_path: Path):
    study, store = studies.write(tmp_path, trials=3)
    store.refuse({"block_size": 16}, "no kernel for blocks of 16", 240)
    store.refuse({"block_size": 16, "max_num_seqs": 4}, "no kernel for blocks of 16")  # proposed all the same
    assert "240 no kernel for blocks of 16" in read(build(store, study, tmp_path / "r.html")).text


def test_a_verdict_is_shown_with_its_table(tmp_path: Path):
    _, outline = page(tmp_path, trials=12, verified=True)
    assert "verified on held-out traffic" in outline.text and "1.9 (1.8 to 2)" in outline.text
    assert "0.74 (0.7 to 0.79)" in outline.text
    assert "probability of being the cheapest" in outline.text and "p best" not in outline.text


def test_a_verification_that_was_not_finished_shows_what_it_measured_and_concludes_nothing(tmp_path: Path):
    study, store = studies.write(tmp_path, trials=4)
    want, config = study.objective, store.trials()[0].config
    steps = (
        replace(studies.step(2.0, want, tokens_per_s=1000), window="t/held-out-0"),
        replace(studies.step(3.0, want, tokens_per_s=1400, ttft_s=9.0), window="t/held-out-0"),
        replace(studies.step(3.0, want, tokens_per_s=1500), window="t/held-out-1"),
        replace(studies.step(4.0, want, tokens_per_s=1500), window="t/held-out-1", untrusted=("client lag",)),
    )
    store.start_trial(9, config, config.params, role="verify", label="verify 1 default", baseline=True)
    store.end_trial(9, Measured(steps))
    store.start_trial(10, config, config.params, role="verify", label="verify 1 trial 1")
    store.end_trial(10, Aborted("interrupted", steps[:1]), again=True)
    outline = read(build(store, study, tmp_path / "r.html"))
    assert "Not finished: 1 launch so far, and nothing is concluded from them." in outline.text
    assert "search measurement, not verified" in outline.text
    rows = re.findall(r"<tr>(.*?)</tr>", (tmp_path / "r.html").read_text())
    first, second = (row for row in rows if ">held-out-" in row)
    assert "3: ttft_p99" in first and ">2<" in first
    assert ">3<" in second and "ttft" not in second


def test_what_starting_the_exported_file_again_found_is_shown_newest_first(tmp_path: Path):
    study, store = studies.write(tmp_path, trials=4)
    again = Store(store.folder / "certify")
    again.folder.mkdir()
    again.log("reaped", what="something else")
    again.log(
        "certified", holds=True, text="**The promise holds** at load 2.\n- ok: cost 0.3 USD, promised 0.3 (+0.0 %)"
    )
    again.log("certified", holds=False, text="**The promise does not hold** at load 2.\n- BROKEN: cost 0.9 USD")
    outline = read(build(store, study, tmp_path / "r.html"))
    first, second = outline.text.index("UTC: The promise does not hold"), outline.text.index("UTC: The promise holds")
    assert first < outline.text.index("BROKEN: cost 0.9 USD") < second < outline.text.index("ok: cost 0.3 USD")


def test_what_ablation_found_stands_with_the_recommendation(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=24, verified=True)
    winner = studies.verification(study, store).config
    assert winner
    found = studies.ablation(study, winner, "max_num_batched_tokens")
    found = replace(found, text=f"{found.text}\n- `max_num_seqs` = 64: set back")
    write_json(store.folder / "ablation.json", found.to_dict())
    text = read(path := build(store, study, tmp_path / "r.html")).text
    assert text.count("Two flags were superfluous.") == 1 and "$0.465" in text
    assert "<p>max_num_seqs = 64: set back</p>" in path.read_text()


def test_names_from_outside_cannot_become_markup(tmp_path: Path):
    evil = "</script><img src=x onerror=alert(1)>"
    study, store = studies.write(tmp_path / "s", trials=4, model=evil)
    studies.add(9, Infeasible("bad", evil, evidence=evil), store)
    path = build(store, study, tmp_path / "r.html")
    assert "<img" not in path.read_text() and evil in read(path).text
    assert evil not in front_svg(summarize(store, study))


def test_a_figure_cannot_end_the_script_that_holds_it():
    assert "<" not in script_json({"a": "</script><b>"})
    assert json.loads(script_json({"a": "</script><b>", "x": float("nan")})) == {"a": "</script><b>", "x": None}


def test_secrets_of_the_study_are_hidden_wherever_they_stand(tmp_path: Path):
    env, args = {"HF_TOKEN": "hf_abc&d", "A": "b"}, {"api-key": "KEY<66", "long-prefill-token-threshold": "2048"}
    frozen = {"engine": {"env": env, "args": args, "command": "x"}, "tracking_uri": "http://bob:hunter2@there"}
    engine = EngineSpec("vllm", env=env, args=args)
    study, store = studies.write(tmp_path / "s", trials=4, frozen=frozen, engine=engine)
    studies.add(4, Infeasible("crash", "with hf_abc&d", "KEY<66", "not hunter2"), store)
    config = replace(store.trials()[0].config, flags={"api-key": "KEY<66"}, env=env)
    store.start_trial(5, config, config.params)
    store.end_trial(5, Measured((studies.step(2.0, study.objective, tokens_per_s=9000),)))
    text = html.unescape(build(store, study, tmp_path / "r.html").read_text())
    for secret in ("hf_abc", "KEY<66", "KEY\\u003c66", "hunter2"):
        assert secret not in text
    assert "with (secret)" in text and "api-key=(secret)" in text and "http://bob:(secret)@there" in text
    assert re.search("long-prefill-token-threshold: .2048", text)


def test_a_page_is_written_beside_another_tuners(tmp_path: Path):
    (tmp_path / ".r.html.tmp").mkdir()  # what another process writes
    study, store = studies.write(tmp_path / "s", trials=1)
    assert build(store, study, tmp_path / "r.html").exists()


def test_an_interval_without_an_upper_end_is_shown_as_one(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=0)
    step = studies.step(1.0, study.objective, tpot_s=0.02, window="t/held-out-0")
    step = replace(step, intervals=step.intervals | {"tpot_p99_s": (0.0189, math.inf)})
    studies.measured(0, (step,), store, baseline=True)
    studies.measured(1, (step,), store, role="verify")
    path = build(store, study, tmp_path / "r.html")
    text = read(path).text
    assert "95 %: ≥ 18.9 ms" in text and "20 (≥ 18.9)" in text and text.count("(≥ 18.9)") >= 2
    assert "inf" not in text.replace("infeasible", "")
    drawn = figures(path)
    for name in ("front", "curve0"):
        bars = [trace["error_y"] for trace in drawn[name]["data"] if "error_y" in trace]
        assert all(b["array"] == [0] and b["arrayminus"] == [pytest.approx(1.1)] for b in bars)
        dots = [shape for shape in drawn[name]["layout"]["shapes"] if shape.get("ysizemode") == "pixel"]
        assert dots and {shape["yanchor"] for shape in dots} == {20.0}


def test_an_emulated_study_is_not_said_to_have_taken_gpu_hours(tmp_path: Path):
    for emulated in (True, False):
        _, outline = page(tmp_path / str(emulated), trials=2, emulated=emulated)
        assert ("GPU-hours" in outline.text) != emulated


def test_the_head_names_the_gpus_and_the_price_of_what_is_recommended(tmp_path: Path):
    """Another type won in a mixed cluster."""
    study, store = studies.study(tmp_path / "s"), Store(tmp_path / "s")
    small = replace(studies.space().config({}, study.model), gpu="L40S", gpus=2)
    studies.measured(0, (studies.step(1.0, study.objective),), store, baseline=True)
    assert summarize(store, study).hardware == "8 x h100-sxm-80gb"
    store.start_trial(1, small, {}, price_usd_per_gpu_hour=1.1)
    store.end_trial(1, Measured((studies.step(1.0, study.objective, tokens_per_s=5000),)))
    head = read(build(store, study, tmp_path / "report.html")).text
    assert "Hardware 2 x L40S" in head and "Price 1.1 USD per GPU-hour" in head
    assert "on 2 x L40S" in front_svg(summarize(store, study))


def test_launches_that_a_kill_cut_off_are_said_to_be_in_no_account(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=3)
    assert "are not counted." in read(build(store, study, tmp_path / "r.html")).text
    for number in (3, 4):
        store.start_trial(number, study.space.config({}, study.model), {})
        store.shelve(number)
    (store.folder / "interrupted" / "study-1").mkdir()
    text = read(build(store, study, tmp_path / "r.html")).text
    assert "are not counted, nor are 2 launches that were cut off" in text


def test_a_value_of_a_parameter_is_no_markup_and_no_colour_in_a_figure():
    assert _short("$accent") == "&#36;accent" and _short("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"


def test_the_still_picture_is_sound_svg_and_marks_what_is_emulated(tmp_path: Path):
    study, store = studies.write(tmp_path / "s", trials=12, emulated=True)
    root = ElementTree.fromstring(front_svg(summarize(store, study)))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "EMULATED" in words and "recommended" in words
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) >= 20
    empty, nothing = studies.write(tmp_path / "n", trials=0)
    assert "no load point was measured" in front_svg(summarize(nothing, empty))


@pytest.mark.slow
def test_a_browser_without_a_network_draws_every_figure(tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine")
    path, _ = page(tmp_path, trials=12)
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.count('class="main-svg"') >= 2 * len(figures(path))
    assert done.stdout.count("js-plotly-plot") >= len(figures(path))


@pytest.mark.parametrize("verified", [False, True])
def test_a_view_is_of_one_reading_of_the_trials(tmp_path: Path, monkeypatch, verified: bool):
    """A trial that ends meanwhile is in all of it or in none."""
    study, store = studies.write(tmp_path / "s", verified=verified)
    reads, trials = [], Store.trials
    monkeypatch.setattr(Store, "trials", lambda self: (reads.append(self.folder), trials(self))[1])
    makers = {
        "page": lambda: build(store, study, tmp_path / "report.html"),
        "best config": lambda: best_config(store, study),
        "note": lambda: markdown(store, study),
        "front": lambda: front_table(store, study),
    }
    counts = {}
    for name, make in makers.items():
        reads.clear()
        make()
        counts[name] = reads.count(store.folder)
    assert counts == dict.fromkeys(makers, 1)
