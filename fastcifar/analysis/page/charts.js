// Charts as SVG: lines with bands, points, a cursor that reads values off, zoom by dragging, a legend that switches.
// A chart is redrawn whole when its size, zoom or series change: a few thousand points, a few milliseconds.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element within `parent`; texts are set as text, never as markup. */
function make(parent, name, attributes = {}, text = null) {
  const element = parent instanceof SVGElement || name === "svg" ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

/** Return round numbers between low and high, about `count` of them; on a logarithmic axis 1, 2 and 5 of each decade. */
function ticks(low, high, count, log, whole) {
  const found = [];
  if (log) {
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
      for (const m of [1, 2, 5]) found.push(m * 10 ** decade);
    const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
    if (inside.length < 4) return ticks(low, high, count, false, whole);  // less than a decade
    return inside.length > count + 2 ? inside.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9) : inside;
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  let step = power * ([1, 2, 5, 10].find((m) => m * power >= rough) || 10);
  if (whole) step = Math.max(1, Math.round(step));
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}

/** Return a number in as few digits as tell it apart on its axis or in the cursor's label. */
function digits(value, places = 4) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(places)));
}

/**
 * Draw a chart into `root` and keep it alive.
 *
 * spec: {title, x: {label, log, whole}, y: {label, low, high}, series: [...]}
 * series: {name, colour, x, y, low, high (a band), marks, sizes (of the marks, 0 to 1), line, thin, dashed, labels (per point), quiet (not in the legend)}
 */
function chart(root, spec) {
  const heading = make(root, "h3", {}, spec.title);
  const reset = make(heading, "button", { class: "reset", type: "button" }, "whole range");
  const svg = make(root, "svg", { tabindex: "0", role: "img", "aria-label": spec.title });
  const legend = make(root, "div", { class: "legend" });
  const tip = make(root, "div", { class: "tip", role: "status" });
  tip.hidden = true;
  const hidden = new Set();
  let zoom = null, scale = null, start = null, at = null;

  const shown = () => spec.series.filter((s) => !hidden.has(s.name));
  const within = (x) => x !== null && (!zoom || (x >= zoom[0] && x <= zoom[1]));

  function ranges() {
    const xs = [], ys = [];
    for (const s of shown())
      s.x.forEach((x, i) => {
        if (!within(x) || s.y[i] === null) return;
        xs.push(x);
        ys.push(s.y[i], s.low ? s.low[i] : s.y[i], s.high ? s.high[i] : s.y[i]);
      });
    const least = (list, other) => list.reduce((a, b) => Math.min(a, b), Infinity) === Infinity ? other : list.reduce((a, b) => Math.min(a, b), Infinity);
    const most = (list, other) => list.reduce((a, b) => Math.max(a, b), -Infinity) === -Infinity ? other : list.reduce((a, b) => Math.max(a, b), -Infinity);
    let x = zoom || [least(xs, 0), most(xs, 1)], y = [spec.y.low ?? least(ys, 0), spec.y.high ?? most(ys, 1)];
    if (x[0] === x[1]) x = spec.x.log ? [x[0] / 2, x[0] * 2] : [x[0] - 0.5, x[1] + 0.5];
    else if (spec.x.log && !zoom) x = [x[0] / 1.15, x[1] * 1.15];
    const margin = (y[1] - y[0]) * 0.06 || Math.abs(y[0]) * 0.05 || 0.5;
    return { x, y: [spec.y.low ?? y[0] - margin, spec.y.high ?? y[1] + margin] };
  }

  function measure() {
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const width = root.clientWidth, height = (spec.height || 15) * rem;
    const { x, y } = ranges();
    const box = { left: 3.1 * rem, right: width - 0.7 * rem, top: 0.6 * rem, bottom: height - 2.6 * rem };
    const f = spec.x.log ? Math.log10 : (v) => v;
    const part = (v) => (f(v) - f(x[0])) / (f(x[1]) - f(x[0]));
    return {
      rem, width, height, x, y, box,
      px: (v) => box.left + part(v) * (box.right - box.left),
      py: (v) => box.bottom - ((v - y[0]) / (y[1] - y[0])) * (box.bottom - box.top),
      back: (px) => {
        const share = Math.min(1, Math.max(0, (px - box.left) / (box.right - box.left)));
        return spec.x.log ? 10 ** (f(x[0]) + share * (f(x[1]) - f(x[0]))) : x[0] + share * (x[1] - x[0]);
      },
    };
  }

  function axes({ rem, px, py, x, y, box, width }) {
    const columns = Math.max(2, Math.floor((box.right - box.left) / (4.2 * rem)));
    for (const v of ticks(y[0], y[1], 5, false, false)) {
      make(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: py(v), y2: py(v) });
      make(svg, "text", { x: box.left - 0.4 * rem, y: py(v) + 0.27 * rem, "text-anchor": "end" }, digits(v));
    }
    for (const v of ticks(x[0], x[1], columns, spec.x.log, spec.x.whole))
      make(svg, "text", { x: px(v), y: box.bottom + 1.15 * rem, "text-anchor": "middle" }, digits(v));
    make(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 2.25 * rem, "text-anchor": "middle" }, spec.x.label);
    make(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  }

  /** Return the points of a series that are in sight, with one neighbour on each side so that lines reach the rim. */
  function visible(s) {
    const keep = s.x.map((x, i) => (within(x) || within(s.x[i - 1] ?? null) || within(s.x[i + 1] ?? null)) && s.y[i] !== null);
    return s.x.map((_, i) => i).filter((i) => keep[i]);
  }

  /** Return the radius of a point in rem; its area goes by its size where it has one. */
  const radius = (s, i) => (s.sizes ? 0.14 + 0.3 * Math.sqrt(s.sizes[i]) : s.thin ? 0.16 : 0.3);

  function draw() {
    svg.replaceChildren();
    scale = measure();
    if (scale.width < 40) return;
    const { px, py, width, height, box, rem } = scale;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    const clip = `clip-${draw.number ??= ++chart.number}`;
    const shape = make(make(svg, "clipPath", { id: clip }), "rect", { x: box.left - 4, y: box.top - 4, width: Math.max(0, box.right - box.left + 8), height: box.bottom - box.top + 8 });
    axes(scale);
    const plot = make(svg, "g", { "clip-path": `url(#${clip})` });
    for (const s of shown()) {
      const rows = visible(s), style = `--colour: var(${s.colour})`;
      const line = (values, list) => list.map((i) => `${px(s.x[i]).toFixed(1)},${py(values[i]).toFixed(1)}`);
      if (s.low && rows.length > 1)
        make(plot, "polygon", { class: "band", style, points: [...line(s.high, rows), ...line(s.low, [...rows].reverse())].join(" ") });
      if (s.line !== false && rows.length > 1)
        make(plot, "polyline", { class: `curve${s.thin ? " thin" : ""}${s.dashed ? " dashed" : ""}`, style, points: line(s.y, rows).join(" ") });
      if (s.marks || rows.length === 1)
        for (const i of rows) make(plot, "circle", { class: "mark", style, cx: px(s.x[i]), cy: py(s.y[i]), r: radius(s, i) * rem });
    }
    root.classList.toggle("zoomed", zoom !== null);
    if (at !== null) cursor(at);
  }

  /** Show what lies at a place: on curves the values at the nearest x, among points the nearest one. */
  function cursor(place) {
    at = place;
    svg.querySelectorAll(".cursor, .ring").forEach((e) => e.remove());
    tip.replaceChildren();
    const hits = spec.nearest === "point" ? nearestPoint(place) : nearestRow(place);
    tip.hidden = hits.length === 0;
    if (!hits.length) return;
    const { px, py, box, width } = scale, x = px(hits[0].s.x[hits[0].i]);
    make(svg, "line", { class: "cursor", x1: x, x2: x, y1: box.top, y2: box.bottom });
    make(tip, "b", {}, spec.nearest === "point" ? hits[0].s.labels?.[hits[0].i] ?? hits[0].s.name : `${spec.x.label} ${digits(hits[0].s.x[hits[0].i])}`);
    for (const { s, i } of hits) {
      make(svg, "circle", { class: "mark ring", style: `--colour: var(${s.colour})`, cx: px(s.x[i]), cy: py(s.y[i]), r: 4 });
      const row = make(tip, "div");
      make(row, "span", { class: "swatch", style: `--colour: var(${s.colour})` });
      const spread = s.low && s.high[i] > s.low[i] ? ` (${digits(s.low[i])} to ${digits(s.high[i])})` : "";
      const where = spec.nearest === "point" ? `${digits(s.y[i])} ${spec.y.label}${s.quiet ? "" : `, ${digits(s.x[i], 3)} ${spec.x.label}`}` : `${s.name} ${digits(s.y[i])}${spread}`;
      row.append(where);
    }
    const right = x > width / 2;
    tip.style.left = right ? "auto" : `${x + 12}px`;
    tip.style.right = right ? `${width - x + 12}px` : "auto";
    const above = svg.getBoundingClientRect().top - root.getBoundingClientRect().top;
    tip.style.top = `${above + box.top}px`;
  }

  function nearestRow(place) {
    const value = scale.back(place.x);
    let best = null;
    for (const s of shown()) for (const x of s.x) if (within(x) && (best === null || Math.abs(x - value) < Math.abs(best - value))) best = x;
    return shown().map((s) => ({ s, i: s.x.indexOf(best) })).filter(({ s, i }) => i >= 0 && s.y[i] !== null);
  }

  function nearestPoint(place) {
    let best = null;
    for (const s of shown())
      visible(s).forEach((i) => {
        const d = Math.hypot(scale.px(s.x[i]) - place.x, scale.py(s.y[i]) - place.y);
        if (best === null || d < best.d) best = { s, i, d };
      });
    return best && best.d < 40 ? [best] : [];
  }

  const place = (event) => {
    const box = svg.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const leave = () => { at = null; tip.hidden = true; svg.querySelectorAll(".cursor, .ring").forEach((e) => e.remove()); };
  svg.addEventListener("pointerdown", (event) => { start = place(event).x; });
  svg.addEventListener("pointermove", (event) => {
    const { x } = place(event);
    svg.querySelector(".zooming")?.remove();
    if (start !== null && Math.abs(x - start) > 6 && !spec.fixed)
      make(svg, "rect", { class: "zooming", x: Math.min(x, start), y: scale.box.top, width: Math.abs(x - start), height: scale.box.bottom - scale.box.top });
    cursor(place(event));
  });
  svg.addEventListener("pointerup", (event) => {
    const { x } = place(event);
    svg.querySelector(".zooming")?.remove();
    if (start !== null && Math.abs(x - start) > 6 && !spec.fixed) zoom = [start, x].map(scale.back).sort((a, b) => a - b);
    start = null;
    draw();
  });
  svg.addEventListener("pointerleave", () => { start = null; svg.querySelector(".zooming")?.remove(); leave(); });
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const xs = [...new Set(shown().flatMap((s) => s.x))].filter(within).sort((a, b) => a - b);
    const here = at === null ? -1 : xs.findIndex((x) => x >= scale.back(at.x) - 1e-9);
    const next = xs[Math.min(xs.length - 1, Math.max(0, here + step))];
    cursor({ x: scale.px(next), y: (scale.box.top + scale.box.bottom) / 2 });
  });
  const whole = () => { zoom = null; draw(); };
  svg.addEventListener("dblclick", whole);
  reset.addEventListener("click", whole);

  const named = spec.series.filter((s) => !s.quiet);
  if (named.length > 1 || spec.legend)
    for (const s of named) {
      const button = make(legend, "button", { type: "button", "aria-pressed": "true" });
      make(button, "span", { class: "swatch", style: `--colour: var(${s.colour})` });
      button.append(s.name);
      button.addEventListener("click", () => {
        hidden.has(s.name) ? hidden.delete(s.name) : hidden.add(s.name);
        button.setAttribute("aria-pressed", String(!hidden.has(s.name)));
        draw();
      });
    }
  root.observer?.disconnect();  // of an earlier chart in the same place
  root.observer = new ResizeObserver(draw);
  root.observer.observe(root);
  draw();
  return { draw };
}
chart.number = 0;
