"""The sweep report in a real browser: charts are drawn, nothing fails, nothing injected runs."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from rayfin.advisor.chart_marks import LIGHT
from rayfin.config import load_config
from rayfin.evaluation import Sample, SweepOutcome, write_sweep_report
from rayfin.history.record import TrialRecord
from rayfin.methods import METHODS

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH; Debian has it as the package 'chromium'"
)

START = datetime(2025, 3, 4, 12, tzinfo=UTC)
OWNED = "document.title='owned'"
EVIL = f'</script><script>{OWNED}</script><img src=x onerror="{OWNED}">'
STATUSES = ("finished", "finished", "stopped", "finished", "failed")
CONFIG = load_config(
    {
        "model": {"name": EVIL},
        "sweep": {
            "parameters": {
                "method.r": [4, 8, 16],
                "method.target_modules": ["all-linear", EVIL],
                "train.learning_rate": {"space": "loguniform", "lower": 1e-5, "upper": 3e-3},
            }
        },
    }
)


def trials(count, statuses=STATUSES):
    """Losses fall with the number; each scored trial has 2 evaluations."""
    rows = []
    for number in range(count):
        status = statuses[number % len(statuses)]
        scored = status != "failed"
        loss = 2 - 0.9 * number / count
        rows.append(
            TrialRecord(
                trial_id=f"t{number}",
                sweep_id="sweep-1",
                fingerprint="f",
                status=status,
                created_at=START + timedelta(minutes=number),
                updated_at=START + timedelta(minutes=number + 1),
                spec={
                    "method": {"r": [4, 8, 16][number % 3], "target_modules": EVIL},
                    "train": {"learning_rate": 1e-5 * (1 + number)},
                },
                metrics={"eval_loss": loss, "base_eval_loss": 2.5, "train_seconds": 30 - number / 9,
                         "peak_memory_bytes": 10**9 + number} if scored else {},
                curve=[{"step": 1, "loss": 2.6}, {"step": 5, "loss": loss, "eval_loss": loss + 0.1},
                       {"step": 10, "loss": loss, "eval_loss": loss}] if scored else [],
                error=None if scored else EVIL,
            )
        )  # fmt: skip
    return rows


class Dom(HTMLParser):
    """Counts elements by class, and keeps the attributes of the root and the title."""

    def __init__(self, text):
        super().__init__()
        self.root, self.title, self.classes, self.rows, self._in_title = {}, "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "html":
            self.root = attributes
        if tag == "tr" and "data-trial" in attributes:
            self.rows.append(
                (int(attributes["data-trial"]), (attributes.get("class") or "").split())
            )
        # Titles of charts are SVG's; the page's comes first.
        self._in_title = tag == "title" and not self.title
        self.classes += (attributes.get("class") or "").split()

    def handle_data(self, data):
        if self._in_title:
            self.title += data
            self._in_title = False

    def count(self, name):
        return self.classes.count(name)


def browse(page, profile, size="1100,900"):
    """The DOM after the page's scripts ran; fails on anything said on the console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}",
         f"--window-size={size}",
         "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        check=False, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    dom = Dom(done.stdout)
    assert dom.root.get("data-ready") == "true"
    assert "data-errors" not in dom.root, dom.root["data-errors"]
    assert dom.title == ("Sweep sweep-1 · rayfin" if dom.rows else "Sweep · rayfin")
    return dom


def report(tmp_path, rows, **options):
    finished = [row for row in rows if row.status == "finished"]
    best = min(finished, key=lambda row: row.metrics["eval_loss"]) if finished else None
    options.setdefault("samples", [Sample(EVIL, EVIL, EVIL, EVIL)])
    options.setdefault("config", CONFIG)
    beside = {key: options.pop(key) for key in ("samples", "notes") if key in options}
    outcome = SweepOutcome(rows, best=best, **options)
    return write_sweep_report(tmp_path / "report.html", outcome, **beside)


def probed(page, script):
    """A copy without the policy that stops foreign scripts, and with one that acts as a user."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text("utf-8"))
    copy = page.with_name("probed.html")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    return copy


def test_every_chart_is_drawn_and_nothing_injected_runs(tmp_path):
    dom = browse(report(tmp_path, trials(10)), tmp_path / "profile")
    scored = 8
    assert dom.count("chart") == 3
    assert dom.count("eval-point") == scored * 2
    assert dom.count("loss-line") == scored
    # One curve a scored trial, and one in each key of the legend.
    assert dom.count("eval-line") == scored * 2
    assert dom.count("base") == 1
    assert dom.count("dot") == scored
    assert dom.count("front") == 1
    assert dom.count("ring") == 1
    assert dom.count("trial-line") == 10
    assert dom.count("unscored") == 2
    assert dom.count("parameter-axis") == 4
    assert dom.count("bar") == 0, "ten trials tell nothing of importance"
    assert dom.count("sample") == 1
    assert [number for number, _ in dom.rows] == list(range(1, 11))


@pytest.mark.parametrize(
    ("rows", "charts"),
    [
        (trials(1), 3),
        ([], 0),
        (trials(3, ["failed"]), 1),
        (trials(2, ["running"]), 3),
        (trials(200), 3),
    ],
    ids=["one", "none", "all failed", "running", "two hundred"],
)
def test_the_page_makes_sense_whatever_happened(tmp_path, rows, charts):
    dom = browse(report(tmp_path, rows, samples=()), tmp_path / "profile", size="400,800")
    assert dom.count("chart") == charts
    assert len(dom.rows) == len(rows)
    assert dom.count("dot") == sum("eval_loss" in row.metrics for row in rows)


LONG = "model.layers.0.self_attn.q_proj_of_a_model_whose_names_are_long"
METHOD_AXES = {
    "method.type": list(METHODS),
    "method.r": list(range(1, 33)),
    "method.num_virtual_tokens": [8, 50],
    "method.target_modules": [["q_proj"], [LONG]],
    "train.learning_rate": {"space": "loguniform", "lower": 1e-9, "upper": 1e-1},
    "train.weight_decay": {"space": "uniform", "lower": 0.1, "upper": 0.10001},
}


def scored(row, loss, base):
    """Its metrics with an interval, whose digits take room."""
    return row.metrics | {
        "eval_loss": loss, "base_eval_loss": base, "eval_loss_change_se": 0.01,
        "perplexity": 2**loss, "base_perplexity": 1e5 * base,
    }  # fmt: skip


def all_methods(count=40, spread=2.0, base=2.5):
    """Trials of every method, each with the axes that its method has; scores lie close together."""
    rows = []
    for number, row in enumerate(trials(count, ["finished", "finished", "stopped", "finished"])):
        name = list(METHODS)[number % len(METHODS)]
        method = {"type": name}
        if METHODS[name].trains == "low rank":
            method |= {"r": 1 + number % 32, "target_modules": [LONG]}
        elif METHODS[name].virtual_tokens:
            method |= {"num_virtual_tokens": 8}
        loss = 1 + spread * (number * 7 % count) / count
        metrics = scored(row, loss, base) | {"train_seconds": 1.5 ** (number * 11 % count)}
        train = {"learning_rate": 1e-9 * 10 ** (number % 8), "weight_decay": 0.1 + 1e-7 * number}
        curve = [{"step": 5, "eval_loss": loss * 1.1}, {"step": 10, "eval_loss": loss}]
        spec = {"method": method, "train": train}
        scenario = {"data": {"rows_eval": 60}}
        rows.append(row.updated(spec=spec, metrics=metrics, curve=curve, scenario=scenario))
    return rows


LOOKS_AT_LABELS = """
  const found = {
    width: innerWidth, overlaps: [], ticks: {}, logs: [], looks: [], texts: 0, described: [],
  };
  for (const id of ["loss", "cost", "parallel"]) {
    const svg = document.querySelector(`#${id} svg.chart`);
    const texts = [...svg.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    found.texts += texts.length;
    texts.forEach(([a, box], index) => texts.slice(index + 1).forEach(([b, other]) => {
      if (box.left < other.right - 1 && other.left < box.right - 1
          && box.top < other.bottom - 3 && other.top < box.bottom - 3) {
        found.overlaps.push(`${id}: ${a.textContent} | ${b.textContent}`);
      }
    }));
    const count = (name) => svg.querySelectorAll(name).length;
    const numbers = texts.filter(([text]) => text.classList.length === 0).length;
    found.ticks[id] = [count(".x-tick"), count(".y-tick"), numbers];
    if (svg.textContent.includes("log scale")) found.logs.push(id);
    const words = svg.querySelector("desc").textContent.length;
    found.described.push(svg.getAttribute("role") === "img" && words > 60);
    const wide = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (wide < 0.99) found.overlaps.push(`${id} is shrunk`);
  }
  for (const mark of document.querySelectorAll("#cost .legend .mark")) {
    found.looks.push([getComputedStyle(mark).fill, mark.getAttribute("d")]);
  }
  for (const table of document.querySelectorAll(".scores")) {
    const room = table.parentElement.getBoundingClientRect().width;
    if (table.getBoundingClientRect().width > room + 1) found.overlaps.push("scores are cut off");
  }
  document.documentElement.dataset.found = JSON.stringify(found);
  parent.postMessage(JSON.stringify(found), "*");
"""


def framed(page, width):
    """A page with `page` in a frame: a window of Chromium's is never narrower than 500 pixels."""
    frame = page.with_name("framed.html")
    frame.write_text(
        "<!doctype html><html data-ready='true'><title>Sweep · rayfin</title><script>"
        "onmessage = (event) => { document.documentElement.dataset.found = event.data; }"
        f"</script><iframe src='{page.name}' width='{width}' height='3000'></iframe>",
        "utf-8",
    )
    return frame


@pytest.mark.parametrize("width", [1280, 390])
def test_no_label_lies_on_another_and_every_axis_has_ticks(tmp_path, width):
    config = load_config({"sweep": {"parameters": METHOD_AXES}})
    page = report(tmp_path, all_methods(), config=config, samples=())
    dom = browse(
        framed(probed(page, LOOKS_AT_LABELS), width), tmp_path / "profile", size="1300,900"
    )
    found = json.loads(dom.root["data-found"])
    assert (found["width"], found["overlaps"]) == (width, [])
    assert found["texts"] > 40
    for chart in ("loss", "cost"):
        across, up, numbers = found["ticks"][chart]
        assert across >= 2 and up >= 2 and numbers >= 4, chart
    assert found["ticks"]["parallel"][1] >= 2 * len(METHOD_AXES)
    assert found["logs"] == ["cost", "parallel"]
    assert found["described"] == [True] * 3
    # Every method that trained has a mark that no other has, and its colour comes again only after
    # the last one: more could not be told apart.
    colours, marks = zip(*found["looks"], strict=True)
    assert len(set(marks)) == len(METHODS)
    assert len(set(colours)) == min(len(METHODS), len(LIGHT))


@pytest.mark.parametrize(
    ("spread", "base", "logs", "lines", "says"),
    [
        (2.0, 2.5, ["cost", "parallel"], 1, "base model 2.5"),
        (2.0, 40.0, ["loss", "cost", "parallel"], 1, "base model 40"),
        (0.001, 9.0, ["cost", "parallel"], 0, "base model 9, above ↑"),
    ],
    ids=["near", "far", "too far for a log scale"],
)
def test_the_base_model_does_not_flatten_the_trials(tmp_path, spread, base, logs, lines, says):
    config = load_config({"sweep": {"parameters": METHOD_AXES}})
    rows = [row.updated(curve=row.curve[-1:]) for row in all_methods(20, spread=spread, base=base)]
    page = report(tmp_path, rows, config=config, samples=())
    script = LOOKS_AT_LABELS + """
      const label = document.querySelector("#loss .base-label").textContent;
      const points = [...document.querySelectorAll("#loss .eval-point")];
      const tops = points.map((point) => point.getBoundingClientRect().top);
      document.documentElement.dataset.label = label;
      document.documentElement.dataset.height = Math.max(...tops) - Math.min(...tops);
    """  # fmt: skip
    dom = browse(probed(page, script), tmp_path / "profile")
    found = json.loads(dom.root["data-found"])
    assert (found["logs"], dom.count("base"), dom.root["data-label"]) == (logs, lines, says)
    assert found["overlaps"] == []
    assert float(dom.root["data-height"]) > 75, "of an axis of about 300 pixels"


def test_policy_stops_scripts_that_are_not_the_page_s_own(tmp_path):
    page = report(tmp_path, trials(3))
    text = page.read_text("utf-8")
    page.write_text(text.replace("</body>", f"<script>{OWNED}</script></body>"), "utf-8")
    with pytest.raises(AssertionError, match="Executing inline script violates"):
        browse(page, tmp_path / "profile")


def test_sorting_hovering_and_brushing(tmp_path):
    script = """
      const heads = [...document.querySelectorAll("#trials thead button")];
      heads.find((head) => head.textContent === "Eval loss").click();
      const send = (target, type, x, y) => target.dispatchEvent(
        new PointerEvent(type, { clientX: x, clientY: y, pointerId: 1, bubbles: true }));
      const area = document.querySelectorAll("#parallel .brush")[0];
      area.scrollIntoView({ block: "center" });
      const box = area.getBoundingClientRect();
      area.setPointerCapture = () => {};
      send(area, "pointerdown", box.x + 9, box.y + 2);
      send(area, "pointermove", box.x + 9, box.y + 30);
      send(area, "pointerup", box.x + 9, box.y + 30);
      const dot = document.querySelector("#cost [data-trial='4'] .dot");
      dot.scrollIntoView({ block: "center" });
      const at = dot.getBoundingClientRect();
      send(dot.ownerSVGElement, "pointermove", at.x + 3, at.y + 3);
      document.documentElement.dataset.tip = document.getElementById("tip").textContent;
      document.querySelectorAll("#cost .controls button")[1].click();
    """
    dom = browse(probed(report(tmp_path, trials(10)), script), tmp_path / "profile")
    # The loss falls with the number; those without one (5 and 10) stay at the end.
    assert [number for number, _ in dom.rows] == [9, 8, 7, 6, 4, 3, 2, 1, 5, 10]
    kept = {number for number, classes in dom.rows if "off" not in classes}
    assert kept == {3, 6, 9}, "the top of the axis method.r is 16"
    assert "#4 t3" in dom.root["data-tip"]
    assert "eval loss 1.73" in dom.root["data-tip"]
    assert "method.r 4" in dom.root["data-tip"]
