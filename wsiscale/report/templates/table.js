"use strict";
(() => {
  const table = document.getElementById("slides");
  const body = table.tBodies[0];
  let rows = Array.from(body.rows);  // in the order in which they are shown
  const heads = Array.from(table.tHead.rows[0].cells);
  const shown = document.getElementById("shown");
  const more = document.getElementById("more");
  let most = 500;  // rows that are shown at once: laying out thousands takes seconds
  const find = document.getElementById("find");
  const picks = Array.from(document.querySelectorAll("select[data-column]"));
  const words = new Intl.Collator("en", { numeric: true });
  const text = (row, column) => row.cells[column].textContent.trim();
  // "1 234" is a number, "0.46 to 0.53" goes by its low end; what is empty comes last, whichever the direction.
  const numberOf = (said) => parseFloat(said.replace(/\s/g, ""));

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const numeric = head.dataset.kind === "number";
      const keyed = rows.map((row) => {
        const said = text(row, column);
        return { row, key: numeric ? numberOf(said) : said, empty: numeric ? Number.isNaN(numberOf(said)) : said === "" };
      });
      keyed.sort((a, b) => {
        if (a.empty || b.empty) return a.empty - b.empty;
        return sign * (numeric ? a.key - b.key : words.compare(a.key, b.key));
      });
      rows = keyed.map(({ row }) => row);
      const sorted = document.createDocumentFragment();
      sorted.append(...rows);
      filter();
      body.append(sorted);
    });
  });

  function filter() {
    const sought = find.value.trim().toLowerCase();
    const wanted = picks.filter((pick) => pick.value !== "").map((pick) => [Number(pick.dataset.column), pick.value]);
    let count = 0;
    rows.forEach((row) => {
      const fits = wanted.every(([column, value]) => text(row, column) === value) && row.textContent.toLowerCase().includes(sought);
      count += fits;
      row.hidden = !fits || count > most;
    });
    more.hidden = count <= most;
    shown.textContent = count > most ? `the first ${most} of ${count} slides` : `${count} of ${rows.length} slides`;
  }
  find.addEventListener("input", filter);
  picks.forEach((pick) => pick.addEventListener("change", filter));
  more.addEventListener("click", () => {
    most = Infinity;
    filter();
  });
  document.getElementById("filters").hidden = false;
  filter();
})();
