"""The sweep report in a real browser: charts are drawn, nothing fails, nothing injected runs."""

import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from rayfin.config import load_config
from rayfin.evaluation import Sample, write_sweep_report
from rayfin.history.record import TrialRecord

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
        check=False, capture_output=True, text=True, timeout=90,
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
    return write_sweep_report(tmp_path / "report.html", rows, config=CONFIG, best=best, **options)


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
