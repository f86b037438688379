// The switch between light and dark: the system's choice first, then the two by turns.
for (const button of document.querySelectorAll(".theme")) {
  const choices = [["light dark", "system"], ["light", "light"], ["dark", "dark"]];
  let now = 0;
  const show = () => {
    document.documentElement.style.colorScheme = now ? choices[now][0] : "";
    button.textContent = `Colours: ${choices[now][1]}`;
  };
  button.addEventListener("click", () => { now = (now + 1) % choices.length; show(); });
  show();
}
