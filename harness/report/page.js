"use strict";
// Draws the charts and sorts the tables. The charts' colours are names that the style sheet sets, so that light, dark and
// print need no other drawing.
{
  const { frame, panels } = JSON.parse(document.getElementById("specs").textContent);
  const options = { renderer: "svg", actions: false, tooltip: { theme: "custom" } };
  const drawings = [...document.querySelectorAll("[data-spec]")].map((element) =>
    window.vegaEmbed(element, { ...frame, ...panels[element.dataset.spec], width: "container" }, options),
  );
  Promise.all(drawings).then(
    () => (document.documentElement.dataset.drawn = drawings.length),
    (error) => console.error(error),
  );

  const compare = (a, b) => {
    const [x, y] = [a, b].map((cell) => (cell.dataset.key === undefined ? NaN : Number(cell.dataset.key)));
    if (Number.isNaN(x) !== Number.isNaN(y)) return { last: Number.isNaN(x) ? 1 : -1 };
    if (Number.isNaN(x)) return { order: a.textContent.localeCompare(b.textContent, "en", { numeric: true }) };
    return { order: x - y };
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const body = button.closest("table").tBodies[0];
      const column = Number(button.dataset.column);
      const rows = [...body.rows].sort((a, b) => {
        const found = compare(a.cells[column], b.cells[column]);
        return found.last ?? sign * found.order; // what has no value stays at the end
      });
      body.append(...rows);
    });
  }

  // Paper has no folds.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of folded) details.open = false;
  });
}
