// Small repairs to the pages: what the theme and Sphinx leave unclear to a browser or a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  const each = (selector, repair) => document.querySelectorAll(selector).forEach(repair);

  // The download button fetches the notebook instead of showing its JSON.
  each('a.btn-download-source-button[href$=".ipynb"]', (link) => {
    link.setAttribute("download", "");
    link.removeAttribute("target");
  });

  // References carry roles that browsers have given up.
  each(".citation-list, .citation", (element) => element.removeAttribute("role"));

  // A figure's own width, for small screens; where it scrolls there, the keyboard reaches it.
  each(".cell_output > img", (image) => {
    const note = () => {
      image.style.setProperty("--width", `${image.naturalWidth}px`);
      const box = image.parentElement;
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    };
    if (image.complete) note();
    else image.addEventListener("load", note);
  });

  // Names: the search button has its own words, and the side bar is a landmark.
  each(".search-button-field", (button) => button.removeAttribute("aria-label"));
  each(".bd-sidebar-primary", (bar) => {
    bar.setAttribute("role", "navigation");
    bar.setAttribute("aria-label", "Book");
  });
});

// Paper is light, whatever the screen is.
const root = document.documentElement;
window.addEventListener("beforeprint", () => {
  root.dataset.themeOnScreen = root.dataset.theme;
  root.dataset.theme = "light";
});
window.addEventListener("afterprint", () => {
  root.dataset.theme = root.dataset.themeOnScreen;
});
