// Elements without markup: whatever comes out of a log goes in as text.

// An element; `text` is its text, `on…` are listeners, a boolean sets or leaves out an attribute, children follow.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

// Children made once for each key and kept, so that focus and scrolling stay where they are.
export function keyed(parent, keys, make) {
  parent.kept ??= new Map();
  for (const [key, child] of parent.kept) {
    if (!keys.includes(key)) { child.root.remove(); parent.kept.delete(key); }
  }
  return keys.map((key, i) => {
    if (!parent.kept.has(key)) parent.kept.set(key, make(key));
    const child = parent.kept.get(key);
    if (parent.children[i] !== child.root) parent.insertBefore(child.root, parent.children[i] ?? null);
    return child;
  });
}

let identifiers = 0;

// A drop-down list with its label: {root, update(options: [[value, text]], value)}.
export function choice(label, onchange) {
  const id = `vit-choice-${++identifiers}`;
  const select = element("select", {"aria-labelledby": id, onchange: () => onchange(select.value)});
  const root = element("label", {class: "choice"}, element("span", {id, text: label}), select);
  let shown = "";
  return {root, select, update(options, value) {
    const wanted = JSON.stringify(options);
    if (wanted !== shown) {
      shown = wanted;
      select.replaceChildren(...options.map(([each, text]) => element("option", {value: each, text})));
    }
    select.value = value;
  }};
}

// A few alternatives side by side, real radio buttons: {root, update(value, disabled: {value: reason})}.
export function segments(label, options, onchange) {
  const name = `vit-${label.replaceAll(" ", "-").toLowerCase()}`;
  const inputs = options.map(([value, text]) => {
    const input = element("input", {type: "radio", name, value, onchange: () => onchange(value)});
    return {value, input, root: element("label", {}, input, element("span", {text}))};
  });
  const root = element("fieldset", {class: "segments"}, element("legend", {text: label}),
    element("div", {}, ...inputs.map((each) => each.root)));
  return {root, update(value, disabled = {}, texts = {}) {
    for (const each of inputs) {
      if (each.value in texts) setText(each.root.lastChild, texts[each.value]);
      each.input.checked = each.value === value;
      each.input.disabled = each.value in disabled && each.value !== value;
      each.root.title = disabled[each.value] ?? "";
    }
  }};
}
