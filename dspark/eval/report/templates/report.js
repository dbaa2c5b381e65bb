"use strict";
// Offers each embedded result file as a download; nothing on the page depends on it.
for (const link of document.querySelectorAll("a[data-source]")) {
  const data = document.getElementById(link.dataset.source).textContent;
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.hidden = false;
}
