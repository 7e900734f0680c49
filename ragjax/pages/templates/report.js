// Filters of the list of predictions: what is ticked must hold of a prediction, and what is typed must stand in it.
"use strict";
const form = document.getElementById("filters");
const items = [...document.querySelectorAll("#list > details")];
const texts = items.map((item) => item.querySelector("summary").textContent.toLowerCase());
function show() {
  const ticked = [...form.querySelectorAll("input:checked")].map((box) => box.value);
  const typed = form.querySelector("input[type=search]").value.trim().toLowerCase();
  let count = 0;
  items.forEach((item, i) => {
    const flags = item.dataset.flags.split(" ");
    item.hidden = !(ticked.every((name) => flags.includes(name)) && texts[i].includes(typed));
    count += !item.hidden;
  });
  form.querySelector("output").textContent = `${count} shown`;
}
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
show();
