// Everything here is a convenience: the page is complete without it.
"use strict";

const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function theme() {
  const button = one("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  label();
}

function download() {
  const blob = new Blob([one("#data").textContent], { type: "application/json" });
  one("#download").href = URL.createObjectURL(blob);
}

// Clicking a heading sorts upwards, then downwards, then back into the original order. Empty cells come last.
function sorting(table) {
  const body = one("tbody", table);
  const original = [...body.rows];
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.classList.contains("none")) return null;
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
  const headings = all("thead th", table);
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[heading.getAttribute("aria-sort")];
      const direction = next === undefined ? "ascending" : next;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      let rows = original;
      if (direction) {
        heading.setAttribute("aria-sort", direction);
        const sign = direction === "ascending" ? 1 : -1;
        rows = original.map((row) => [key(row, column), row]).sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * compare(a, b);
        }).map(([, row]) => row);
      }
      body.append(...rows);
    });
  });
}

function filtering(form) {
  const rows = all("tbody tr", one("table", form.nextElementSibling));
  const apply = () => {
    const verdict = form.elements.verdict.value;
    const name = form.elements.name.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (verdict === "all" || row.dataset.verdict === verdict)
        && row.cells[0].textContent.toLowerCase().includes(name);
      row.hidden = !fits;
      shown += fits;
    }
    one("output", form).textContent = `${shown} of ${rows.length} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

theme();
download();
one(".tools").hidden = false;
all("table.sortable").forEach(sorting);
all("form.filter").forEach(filtering);

// What is folded would be missing on paper.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = all("details:not([open])");
  unfolded.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => unfolded.forEach((details) => { details.open = false; }));
