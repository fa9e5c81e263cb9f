// Scales, axes and the few SVG helpers that the charts share.

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element; a `text` attribute becomes its text, so nothing is ever parsed as markup. */
function draw(parent, name, attributes = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  parent.append(element);
  return element;
}

/** An HTML element, with the same rule. */
function html(parent, name, attributes = {}) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  parent.append(element);
  return element;
}

/** Significant digits without trailing zeros; powers of ten below 0.01. */
function show(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 0.01) return value.toExponential(digits - 2).replace(/\.?0+e/, "e").replace("e+", "e");
  const text = value.toFixed(Math.min(20, Math.max(0, digits - 1 - Math.floor(Math.log10(size)))));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** Ticks in as few digits as tell them apart. */
function showTicks(ticks) {
  for (let digits = 4; ; digits++) {
    const texts = ticks.map((tick) => show(tick, digits));
    if (digits > 12 || new Set(texts).size === ticks.length) return texts;
  }
}

function withUnit(value, unit) {
  return unit ? `${show(value)} ${unit}` : show(value);
}

/** Round numbers between low and high: steps of 1, 2 or 5 times a power of ten. */
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

/** Powers of ten, with 2 and 5 between them where there are few; round numbers on a short way. */
function logTicks(low, high) {
  const factors = Math.log10(high / low) < 2.5 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(6));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length > 2 ? ticks : linearTicks(low, high, 6);
}

/** Maps [low, high] to [from, to]; equal ends are spread so that one value still has an axis. */
function scale(kind, low, high, from, to, count = 5) {
  if (low === high) {
    const margin = Math.abs(low) * 0.1 || 1;
    [low, high] = kind === "log" ? [low / 2, high * 2] : [low - margin, high + margin];
  }
  const bend = kind === "log" ? Math.log : (x) => x;
  const place = (value) => from + ((bend(value) - bend(low)) / (bend(high) - bend(low))) * (to - from);
  const ticks = kind === "log" ? logTicks(low, high) : linearTicks(low, high, count);
  return { kind, place, ticks, low, high };
}

/**
 * Least and greatest value, leaving out a few that are far beyond the rest: one diverged trial
 * would flatten everything else. `cut` says whether any were left out.
 */
function extent(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  let [low, high] = [sorted[0], sorted[sorted.length - 1]];
  let cut = false;
  if (sorted.length >= 8) {
    const reach = 4 * (at(0.9) - at(0.1)) || Infinity;
    const inside = sorted.filter((v) => v >= at(0.1) - reach && v <= at(0.9) + reach);
    cut = inside.length < sorted.length;
    [low, high] = [inside[0], inside[inside.length - 1]];
  }
  return { low, high, cut };
}

/** `low` and `high` moved apart by a share of their distance. */
function padded({ low, high }, share) {
  const margin = (high - low) * share;
  return [low - margin, high + margin];
}

/** An SVG as wide as its container, with a name and a text for those who do not see it. */
function canvas(container, height, title, sentences, width = container.clientWidth || 720) {
  container.replaceChildren();
  const name = `${container.parentElement.id}-name`;
  const svg = draw(container, "svg", {
    class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": `${name} ${name}-text`,
  });
  draw(svg, "title", { id: name, text: title });
  draw(svg, "desc", { id: `${name}-text`, text: `${sentences.filter(Boolean).join(" ")} The table of all trials has the numbers.` });
  return { svg, width, height };
}

/** Texts of one chart that keep clear of each other and of what else takes room. */
class Labels {
  constructor(width) {
    this.width = width;
    this.taken = [];
  }

  take(box) {
    this.taken.push(box);
  }

  free({ x, y, width, height }) {
    return x > -4 && x + width < this.width + 4 && this.taken.every((other) =>
      x > other.x + other.width || other.x > x + width || y > other.y + other.height || other.y > y + height);
  }

  /** The text at the first of `places` that is free, or none. */
  add(parent, attributes, places = [{}], gap = 3) {
    const text = draw(parent, "text", attributes);
    for (const place of places) {
      for (const [key, value] of Object.entries(place)) text.setAttribute(key, value);
      const { x, y, width, height } = text.getBBox();
      if (!this.free({ x: x - gap, y, width: width + 2 * gap, height })) continue;
      this.take({ x, y, width, height });
      return text;
    }
    text.remove();
    return null;
  }
}

/** Places around a point at which a text may stand. */
function around(x, y, reach) {
  return [
    { x: x - reach, y: y + 4, "text-anchor": "end" }, { x: x + reach, y: y + 4, "text-anchor": "start" },
    { x, y: y - reach - 2, "text-anchor": "middle" }, { x, y: y + reach + 11, "text-anchor": "middle" },
  ];
}

/** Ticks in the order in which they get their labels: of a logarithmic axis the powers of ten first. */
function byWeight({ kind, ticks }) {
  const round = (tick) => kind === "log" && Number.isInteger(Number(Math.log10(tick).toFixed(9)));
  return [...ticks.keys()].sort((a, b) => round(ticks[b]) - round(ticks[a]) || a - b);
}

/** Left and bottom axes with ticks, grid lines and titles, which say where a scale is logarithmic. */
function axes(svg, labels, x, y, box, xTitle, yTitle) {
  const named = (title, { kind }) => (kind === "log" ? `${title}, log scale` : title);
  labels.add(svg, { class: "title", x: 2, y: box.top - 16, text: named(yTitle, y) });
  labels.add(svg, { class: "title", x: box.right, y: box.bottom + 36, "text-anchor": "end", text: named(xTitle, x) });
  const [xTexts, yTexts] = [showTicks(x.ticks), showTicks(y.ticks)];
  for (const tick of y.ticks) {
    const at = y.place(tick);
    draw(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at });
    draw(svg, "line", { class: "axis y-tick", x1: box.left - 4, x2: box.left, y1: at, y2: at });
  }
  for (const index of byWeight(y)) {
    labels.add(svg, { x: box.left - 8, y: y.place(y.ticks[index]) + 4, "text-anchor": "end", text: yTexts[index] });
  }
  for (const tick of x.ticks) {
    const at = x.place(tick);
    draw(svg, "line", { class: "axis x-tick", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 });
  }
  for (const index of byWeight(x)) {
    const at = { x: x.place(x.ticks[index]), y: box.bottom + 18 };
    const ends = { ...at, x: box.right + 4, "text-anchor": "end" };
    labels.add(svg, { text: xTexts[index] }, [{ ...at, "text-anchor": "middle" }, ...(at.x > box.right - 20 ? [ends] : [])], 5);
  }
  draw(svg, "path", { class: "axis", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` });
}

/** Room that the labels of an axis on the left need. */
function roomFor(ticks) {
  return 18 + 7 * Math.max(...showTicks(ticks).map((text) => text.length));
}

/** A mark of one of the ten shapes. */
function drawMark(parent, report, look, cx, cy, r, classes) {
  return draw(parent, "path", {
    class: `mark ${classes}`, d: report.marks[look], transform: `translate(${cx.toFixed(1)} ${cy.toFixed(1)}) scale(${r})`,
  });
}

function titled({ label, unit }) {
  return unit ? `${label} (${unit})` : label;
}

/** Instead of a chart: why there is none. */
function nothing(container, text) {
  container.replaceChildren();
  html(container, "p", { class: "notice", text });
}

function line(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}
