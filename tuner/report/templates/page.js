"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = window.matchMedia("(max-width: 40rem)");

  // "$accent" in a figure is the page's own colour, light or dark.
  const painted = (value, style) => {
    if (typeof value === "string" && /^\$[a-z]+\d?$/.test(value)) return style.getPropertyValue("--" + value.slice(1)).trim();
    if (Array.isArray(value)) return value.map((item) => painted(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
    }
    return value;
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = painted(figures[place.dataset.figure], style);
      if (figure.height) place.style.height = figure.height + "px";
      if (figure.width) place.style.minWidth = figure.width + "px";
      figure.layout.font.family = style.getPropertyValue("--sans").trim();
      figure.layout.autosize = true;
      if (narrow.matches) {
        figure.layout.font.size = 12;
        figure.layout.margin = { ...figure.layout.margin, l: Math.min(figure.layout.margin.l, 52), r: 8 };
      }
      // No mode bar: drag zooms, a double click goes back, and nothing here offers to send a figure anywhere.
      Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
    }
  };

  const closed = [];
  window.addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    for (const item of document.querySelectorAll("details:not([open])")) { item.open = true; closed.push(item); }
    draw();
  });
  window.addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    while (closed.length) closed.pop().open = false;
    draw();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    table.tHead.addEventListener("click", (event) => {
      const head = event.target.closest("th");
      if (!head) return;
      const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.trim();
      const number = (text) => { const n = parseFloat(text.replace(/,/g, "")); return Number.isNaN(n) ? Infinity : n; };
      const order = head.classList.contains("n") ? (a, b) => number(key(a)) - number(key(b)) : (a, b) => key(a).localeCompare(key(b));
      [...body.rows].sort((a, b) => (down ? -1 : 1) * order(a, b)).forEach((row) => body.append(row));
    });
  }
})();
