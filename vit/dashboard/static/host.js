// The window around the viewer: where its URL is, and whether it is dark.  In TensorBoard the viewer lives in a frame;
// the address that a person copies is the parent's, whose hash TensorBoard shares out by `p.<plugin>.<name>`.

const PREFIX = "p.vit_attention.";
const TAB = "vit_attention";

export function windowHost() {
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  return {
    ...hashIn(window, "", () => true),
    dark: () => prefers.matches,
    onTheme: (listener) => prefers.addEventListener("change", listener),
  };
}

// Falls back to the frame's own window where the parent is somebody else's, as in a notebook.
export function tensorboardHost() {
  try {
    const body = window.parent.document.body;
    if (window.parent === window) return windowHost();
    return {
      ...hashIn(window.parent, PREFIX, (tab) => tab === TAB || tab === ""),
      dark: () => body.classList.contains("dark-mode"),
      onTheme: (listener) => new MutationObserver(listener).observe(body, {attributeFilter: ["class"]}),
    };
  } catch {
    return windowHost();
  }
}

// The hash of a window as parameters; what others keep there stays.  `mine(tab)` says whether the hash is ours now.
function hashIn(target, prefix, mine) {
  const parts = () => target.location.hash.slice(1).split("&").filter((part) => part);
  const isOwn = (part) => part.includes("=") && part.startsWith(prefix);
  const tabOf = () => parts().find((part) => !part.includes("=")) ?? "";

  function read() {
    const parameters = {};
    for (const part of parts().filter(isOwn)) {
      const [name, value] = part.slice(prefix.length).split("=");
      try { parameters[name] = decodeURIComponent(value); } catch { /* not something that we wrote */ }
    }
    return parameters;
  }

  function link(parameters) {
    const own = Object.entries(parameters).map(([name, value]) => `${prefix}${name}=${encodeURIComponent(value)}`);
    const others = parts().filter((part) => !isOwn(part));
    if (prefix && !tabOf()) others.unshift(TAB);
    const url = new URL(target.location.href);
    url.hash = [...others, ...own].join("&");
    return url.href;
  }

  function write(parameters, push) {
    const url = link(parameters);
    if (url === target.location.href || !mine(tabOf())) return;
    // TensorBoard keeps something of its own in the state of the history, so that state goes along
    target.history[push ? "pushState" : "replaceState"](target.history.state, "", url);
  }

  function onChange(listener) {
    const changed = () => { if (mine(tabOf())) listener(); };
    target.addEventListener("popstate", changed);
    target.addEventListener("hashchange", changed);
  }

  return {read, link, write, onChange};
}
