// Ties the page together: one highlight and one filter for all charts and the table.

const report = JSON.parse(document.getElementById("report-data").textContent);
const byId = (id) => document.getElementById(id);
const tip = byId("tip");

const page = {
  training: report.trials.length <= 12,
  cost: 0,
  picks: new Map(),
  pinned: null,

  /** Swept settings of a trial, a line each. */
  settings(trial) {
    return report.parameters
      .filter((p) => p.values[trial.number - 1] !== null)
      .map((p) => {
        const value = p.values[trial.number - 1];
        return `${p.name} ${p.kind === "choice" ? p.choices[value] : show(value)}`;
      });
  },

  /** Makes the nearest of `hits` answer to the pointer. */
  hover(svg, hits) {
    const nearest = (event) => {
      const frame = svg.getBoundingClientRect();
      const ratio = svg.viewBox.baseVal.width / frame.width;
      const [x, y] = [(event.clientX - frame.left) * ratio, (event.clientY - frame.top) * ratio];
      let found = null;
      let least = 30 ** 2;
      for (const hit of hits) {
        const distance = (hit.x - x) ** 2 + (hit.y - y) ** 2;
        if (distance < least) [found, least] = [hit, distance];
      }
      return found;
    };
    const follow = (event) => {
      const hit = nearest(event);
      if (!hit) return page.leave();
      page.light(hit.trial.number);
      explain(hit, event);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", () => page.leave());
  },

  leave() {
    tip.hidden = true;
    page.light(page.pinned);
  },

  /** Brings one trial to the front everywhere; null for none. */
  light(number) {
    if (page.lit === number) return;
    page.lit = number;
    document.body.classList.toggle("lighting", number !== null);
    for (const mark of document.querySelectorAll("[data-trial]")) {
      mark.classList.toggle("lit", Number(mark.dataset.trial) === number);
    }
  },

  pick(index, pick) {
    if (pick) page.picks.set(index, pick);
    else page.picks.delete(index);
    page.filter();
  },

  /** Fades the trials that a brush leaves out. */
  filter() {
    const kept = (index) => [...page.picks.values()].every(({ stretch, values, place }) => {
      if (values[index] === null) return false;
      const at = place(values[index]);
      return at >= stretch[0] && at <= stretch[1];
    });
    let count = 0;
    report.trials.forEach((trial, index) => {
      const keep = kept(index);
      count += keep;
      for (const mark of document.querySelectorAll(`[data-trial="${trial.number}"]`)) mark.classList.toggle("off", !keep);
    });
    const controls = byId("parallel").querySelector(".controls");
    controls.replaceChildren();
    if (!page.picks.size) return;
    html(controls, "span", { text: `${count} of ${report.trials.length} trials kept` });
    html(controls, "button", { type: "button", text: "Keep all" }).addEventListener("click", () => {
      page.picks.clear();
      drawAll();
    });
  },
};

function explain(hit, event) {
  tip.replaceChildren();
  html(tip, "b", { text: `#${hit.trial.number} ${hit.trial.id}` });
  const settings = page.settings(hit.trial).filter((text) => !hit.lines.includes(text));
  for (const text of hit.lines) html(tip, "div", { text });
  for (const text of settings) html(tip, "span", { text });
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? event.clientY + 16 : Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
}

function legend() {
  const container = byId("loss").querySelector(".legend");
  const look = looks(report);
  const colours = [...look.keys()];
  const drawn = report.trials.filter((t) => t.evalLoss.length || t.loss.length).length;
  colours.forEach((trial) => {
    const button = html(container, "button", { type: "button", "aria-pressed": "false" });
    const key = draw(button, "svg", { viewBox: "0 0 20 10", "aria-hidden": "true" });
    const group = draw(key, "g", { class: `series c${look.get(trial)} ${trial.status}` });
    draw(group, "path", { class: "eval-line", d: "M1 5H19" });
    drawMark(group, report, look.get(trial), 10, 5, 3.5, "key");
    const unscored = trial.other ? "other held-out tokens" : "no score";
    const score = trial.metric === null ? unscored : withUnit(trial.metric, report.metric.unit);
    const method = compares(report) ? `${report.methods.find((m) => m.look === trial.look).name} ` : "";
    html(button, "span", { text: `${method}#${trial.number}  ${score}${trial.best ? ", best" : ""}` });
    button.title = [trial.id, ...page.settings(trial)].join("\n");
    for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => page.light(trial.number));
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => page.leave());
    button.addEventListener("click", () => {
      page.pinned = page.pinned === trial.number ? null : trial.number;
      for (const other of container.querySelectorAll("button")) {
        other.setAttribute("aria-pressed", String(other === button && page.pinned !== null));
      }
      page.light(page.pinned);
    });
  });
  const methods = byId("cost").querySelector(".legend");
  for (const { name, look: index } of compares(report) ? report.methods : []) {
    const entry = html(methods, "span", { class: "method" });
    const key = draw(entry, "svg", { viewBox: "0 0 20 10", "aria-hidden": "true" });
    drawMark(draw(key, "g", { class: `series c${index}` }), report, index, 10, 5, 4, "key");
    html(entry, "span", { text: name });
  }
  if (drawn > colours.length) html(container, "span", { text: `and ${drawn - colours.length} more in grey` });
}

function controls() {
  const loss = byId("loss").querySelector(".controls");
  if (report.trials.some((t) => t.loss.length)) {
    const button = html(loss, "button", { type: "button", text: "Training loss", "aria-pressed": String(page.training) });
    button.addEventListener("click", () => {
      page.training = !page.training;
      button.setAttribute("aria-pressed", String(page.training));
      drawAll();
    });
  }
  const cost = byId("cost").querySelector(".controls");
  report.costs.forEach(({ label }, index) => {
    const button = html(cost, "button", { type: "button", text: label, "aria-pressed": String(index === page.cost) });
    button.addEventListener("click", () => {
      page.cost = index;
      for (const other of cost.children) other.setAttribute("aria-pressed", String(other === button));
      drawAll();
    });
  });
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => (a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b));
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const empty = (row) => ["", "–"].includes(value(row, column));
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        // What has no value stays at the end, whichever way the rest runs.
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        return (descending ? -1 : 1) * compare(value(a, column), value(b, column));
      });
      table.tBodies[0].append(...rows);
    });
  });
  for (const row of table.tBodies[0].rows) {
    row.addEventListener("pointerenter", () => page.light(Number(row.dataset.trial)));
    row.addEventListener("pointerleave", () => page.leave());
  }
}

function drawAll() {
  const charts = { loss: drawLoss, cost: drawCost, parallel: drawParallel };
  for (const [id, chart] of Object.entries(charts)) {
    try {
      chart(byId(id), report, page);
    } catch (error) {
      // The rest of the page is still worth reading; say what is missing and why.
      nothing(byId(id).querySelector(".plot"), `This chart could not be drawn: ${error.message}`);
      document.documentElement.dataset.errors = `${id}: ${error.stack ?? error}`;
    }
  }
  page.lit = null;
  page.filter();
}

window.addEventListener("error", (event) => {
  document.documentElement.dataset.errors = event.message;
});
if (byId("trials")) sortable(byId("trials"));
controls();
legend();
drawAll();
let drawnWidth = document.body.clientWidth;
window.addEventListener("resize", () => {
  if (document.body.clientWidth === drawnWidth) return;
  drawnWidth = document.body.clientWidth;
  drawAll();
});
document.documentElement.dataset.ready = "true";
