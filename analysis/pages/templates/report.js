"use strict";
(() => {
  const palettes = JSON.parse(document.getElementById("palettes").textContent);
  const figures = {};
  document.querySelectorAll("script.figures").forEach((s) => Object.assign(figures, JSON.parse(s.textContent)));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => window.innerWidth < 760;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = new Map(); // figure key → {element, axis, zoom}

  const colour = (trace) => {
    const list = palettes["part" in trace.meta ? "parts" : "arms"][dark.matches ? "dark" : "light"];
    return list[("part" in trace.meta ? trace.meta.part : trace.meta.arm) % list.length];
  };

  const isChosen = (trace, view) => trace.meta.choice.every((c, i) => c === view.choice[i]);

  const pen = document.createElement("canvas").getContext("2d");
  const textWidth = (text) => {
    pen.font = `600 13px ${getComputedStyle(document.body).fontFamily}`;
    return pen.measureText(text).width;
  };

  const fitted = (text, room) => {
    if (textWidth(text) <= room) return text;
    let kept = text.length;
    while (kept > 1 && textWidth(`${text.slice(0, kept)}…`) > room) kept -= 1;
    return `${text.slice(0, kept)}…`;
  };

  function traces(figure, view) {
    return figure.data.map((original) => {
      const trace = { ...original };
      const meta = trace.meta || {};
      if ("arm" in meta) {
        if (meta.band) trace.fillcolor = colour(trace);
        else { trace.line = { ...trace.line, color: colour(trace) }; trace.marker = { ...trace.marker, color: colour(trace) }; }
      }
      if ("part" in meta) trace.marker = { ...trace.marker, color: colour(trace), line: { width: 1, color: css("--ground") } };
      if (meta.x && view.axis) trace.x = meta.x[view.axis];
      if ("choice" in meta) trace.visible = isChosen(trace, view);
      if (trace.type === "heatmap") trace.colorbar = { ...trace.colorbar, tickfont: { color: css("--soft") }, outlinewidth: 0 };
      return trace;
    });
  }

  function axisStyle(axis) {
    const soft = css("--soft");
    const title = axis.title ? { ...axis.title, font: { size: 13, color: soft }, standoff: 10 } : undefined;
    return {
      ...axis, title, gridcolor: css("--grid"), linecolor: css("--rule"), zerolinecolor: css("--grid"),
      tickfont: { size: axis.type === "log" ? 10 : 12, color: soft } /* plotly enlarges powers by a quarter */, automargin: true, ticks: "", zeroline: false,
    };
  }

  function layout(figure, view) {
    const meta = figure.layout.meta || {};
    const out = {
      ...figure.layout,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--text") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow() ? 48 : 64, r: narrow() ? 12 : 20, t: 14, b: 48 },
      xaxis: axisStyle(figure.layout.xaxis || {}), yaxis: axisStyle(figure.layout.yaxis || {}),
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--rule"), font: { color: css("--text"), size: 12 } },
      legend: { ...figure.layout.legend, orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    };
    if (!meta.main && figure.layout.showlegend !== false && figure.data.some((t) => t.showlegend !== false && t.type !== "heatmap")) {
      out.showlegend = true;
      out.margin.t = 44;
    }
    if (meta.heat) { out.xaxis.nticks = narrow() ? 6 : 14; out.xaxis.showgrid = out.yaxis.showgrid = false; out.yaxis.tickfont.size = 11; heatLayout(out, figure, view); }
    if (meta.bars) { out.yaxis.showgrid = false; out.yaxis.tickfont = { size: 13, color: css("--text") }; out.margin.t = 58; }
    if (meta.titles && view.axis) {
      out.xaxis.title.text = meta.titles[view.axis];
      out.xaxis.exponentformat = view.axis === "flops" ? "power" : "SI";
    }
    if (meta.main) mainLayout(out, meta, view);
    return out;
  }

  // The colour bar takes what the shown figure's name needs; an optimizer that lacks the figure says so.
  function heatLayout(out, figure, view) {
    if (figure.data.some((trace) => isChosen(trace, view))) return;
    out.annotations = [{ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, text: "not recorded for this optimizer", font: { size: 14, color: css("--soft") } }];
    out.xaxis.visible = out.yaxis.visible = false;
  }

  function mainLayout(out, meta, view) {
    const range = meta.ranges[view.axis][view.zoom];
    view.room = narrow() ? 100 : 230;
    out.margin.r = 14 + Math.min(Math.max(...meta.labels.map((l) => textWidth(l.text))), view.room);
    out.margin.t = 10;
    out.xaxis.range = range.x.slice();
    out.yaxis.range = range.y.slice();
    out.shapes = []; out.annotations = [];
    const rule = (y, text, dash, atRight) => {
      if (y === null || y === undefined) return;
      out.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--soft"), width: 1, dash } });
      if (y < range.y[0] || y > range.y[1]) return;
      out.annotations.push({
        xref: "paper", x: atRight ? 1 : 0, xanchor: atRight ? "right" : "left", y, yanchor: "bottom", text, showarrow: false,
        font: { size: 12, color: css("--soft") },
      });
    };
    rule(meta.entropy, `unigram entropy ${meta.entropy === null ? "" : meta.entropy.toFixed(2)}`, "dash", true);
    if (view.zoom === "finish") rule(meta.target, "target", "dot", false);
    out.annotations.push(...endLabels(out, meta, view, range));
  }

  // Places in the order of the targets, at least `gap` apart and above `end`, that miss the targets by the least
  // sum of squares: isotonic regression (pool adjacent violators) on the targets less what the gaps take.
  function spread(targets, gap, end) {
    const pools = [];
    targets.forEach((target, i) => {
      pools.push({ sum: target - i * gap, n: 1 });
      while (pools.length > 1) {
        const [before, last] = pools.slice(-2);
        if (before.sum / before.n <= last.sum / last.n) break;
        pools.splice(-2, 2, { sum: before.sum + last.sum, n: before.n + last.n });
      }
    });
    const highest = end - (targets.length - 1) * gap;
    return pools.flatMap((p) => Array(p.n).fill(Math.min(p.sum / p.n, highest))).map((place, i) => place + i * gap);
  }

  // Labels stand at the ends of their curves; where they would cover each other they are pushed apart.
  function endLabels(out, meta, view, range) {
    const height = view.height - out.margin.t - out.margin.b - 14;
    const gap = 17;
    const pixel = (y) => ((range.y[1] - y) / (range.y[1] - range.y[0])) * height;
    const shown = meta.labels
      .filter((l) => l.y >= range.y[0] && l.y <= range.y[1])
      .map((l) => ({ ...l, at: pixel(l.y) }))
      .sort((a, b) => a.at - b.at);
    const places = spread(shown.map((l) => l.at), gap, height + out.margin.b - 12);
    const list = palettes.arms[dark.matches ? "dark" : "light"];
    return shown.map((l, i) => ({
      x: l.x[view.axis], y: l.y, xanchor: "left", yanchor: "middle", xshift: 6, yshift: l.at - places[i], showarrow: false,
      text: fitted(l.text, view.room).replace(/</g, "&lt;"), hovertext: l.text.replace(/</g, "&lt;"), font: { size: 13, color: list[l.arm % list.length], weight: 600 },
    }));
  }

  function draw(key) {
    const { element, view } = drawn.get(key);
    // On a narrow screen the legend of bars stands in lines of its own.
    element.style.height = `${figures[key].height + (narrow() && (figures[key].figure.layout.meta || {}).bars ? 110 : 0)}px`;
    const figure = figures[key].figure;
    view.height = element.clientHeight;
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], displayModeBar: narrow() || document.body.className === "picture" ? false : "hover" };
    Plotly.react(element, traces(figure, view), layout(figure, view), config);
    element.dataset.drawn = "yes";
  }

  const drawMissing = () => drawn.forEach(({ element }, key) => { if (!element.dataset.drawn) draw(key); });

  // What comes into view is drawn at once. The rest follows, one figure for each pause, so that a page that is
  // captured or printed without having been scrolled is whole, and one that is read is never blocked for long.
  const observer = new IntersectionObserver((entries) => {
    entries.filter((e) => e.isIntersecting && !e.target.dataset.drawn).forEach((e) => draw(e.target.dataset.figure));
  }, { rootMargin: "500px" });
  const pause = window.requestIdleCallback || ((next) => setTimeout(next, 50));
  const drawNext = () => {
    const next = [...drawn].find(([, { element }]) => !element.dataset.drawn);
    if (next) { draw(next[0]); pause(drawNext); }
    else document.documentElement.dataset.complete = "yes";
  };
  document.querySelectorAll("[data-figure]").forEach((element) => {
    const plot = figures[element.dataset.figure];
    if (!plot) return;
    drawn.set(element.dataset.figure, { element, view: { axis: plot.axes[0], zoom: "finish", choice: plot.choices ? Object.keys(plot.choices).map(() => 0) : [] } });
    observer.observe(element);
  });

  document.addEventListener("change", (event) => {
    const { role, plot } = event.target.dataset;
    if (!role || !drawn.has(plot)) return;
    const { view } = drawn.get(plot);
    if (role === "choice") view.choice[Number(event.target.dataset.which)] = Number(event.target.value);
    else view[role] = event.target.value;
    draw(plot);
  });
  const redraw = () => drawn.forEach(({ element }, key) => { if (element.dataset.drawn) draw(key); });
  dark.addEventListener("change", redraw);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; redraw(); }
  });
  // On paper the page is narrower than on the screen: the class sets its width, and all figures are drawn to it.
  window.addEventListener("beforeprint", () => { document.body.classList.add("on-paper"); drawMissing(); redraw(); });
  window.addEventListener("afterprint", () => { document.body.classList.remove("on-paper"); redraw(); });
  window.addEventListener("load", () => setTimeout(() => pause(drawNext), 400));
})();
