// SPDX-License-Identifier: Apache-2.0
// Texts lie in the page compressed, and are put in place when they are opened.
const packed = JSON.parse(document.getElementById("schedules-texts").textContent);

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

async function show(details) {
  const place = details.querySelector("div");
  if (!details.open || place.childElementCount) return;
  place.innerHTML = await unpack(packed[details.dataset.text]);
  for (const button of place.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const fold = button.closest("tbody");
      fold.nextElementSibling.hidden = false;
      fold.remove();
    });
  }
}

for (const details of document.querySelectorAll("details[data-text]")) {
  details.addEventListener("toggle", () => show(details));
  show(details);
}
