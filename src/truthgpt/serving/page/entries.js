// One question and its answer, or one prompt and its continuation, as the page shows it. All text is set as text.

/** An element with a class and perhaps text. */
export function element(name, className = "", text = null) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}

/** A button that looks like text. */
function quietButton(text, action, className = "") {
  const button = element("button", `quiet ${className}`, text);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

/** Show text in `host`, a part a child; only the last one grows, so that what is selected further up stays so. */
function showFenced(host, text) {
  const parts = text.split(/^```[^\n`]*(?:\n|$)/m);
  parts.forEach((part, index) => {
    const inCode = index % 2 === 1;
    const shown = inCode || index === 0 ? part : part.replace(/^\n+/, "");
    const child = host.children[index] ?? host.appendChild(element(inCode ? "pre" : "div", inCode ? "code" : "prose"));
    const trimmed = index < parts.length - 1 ? shown.trimEnd() : shown;
    if (child.textContent !== trimmed) child.textContent = trimmed;
  });
  while (host.children.length > parts.length) host.lastChild.remove();
}

/** What an answer took: live while it is written, exact when the server's count has come. */
export class Clock {
  constructor() {
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
  }

  /** `tokens` have come so far. */
  note(tokens) {
    this.last = performance.now();
    if (this.first === null && tokens > 0) this.first = this.last;
    this.tokens = tokens;
  }

  text() {
    if (this.first === null) return "waiting for the first token";
    const parts = [`${this.tokens.toLocaleString("en")} ${this.tokens === 1 ? "token" : "tokens"}`];
    // Over the whole time: a browser that is busy reads the first tokens late and together, which would make the rest
    // look faster than it was written.
    const speed = this.tokens / ((this.last - this.started) / 1000);
    if (this.tokens > 1) parts.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
    parts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

const ENDINGS = { length: "limit reached", cancelled: "stopped" };

/**
 * One entry of a log. `actions` are functions of the page: retry, edit, resume (null where it has no meaning).
 * The page adds to `answer` and calls `show`; `finish` or `fail` ends it. `leftOut`: questions the model was not sent.
 */
export class Entry {
  constructor(mode, prompt, actions) {
    this.mode = mode;
    this.prompt = prompt;
    this.actions = actions;
    this.answer = "";
    this.leftOut = 0;
    this.node = element("article", `entry ${mode}`);
    this.body = element("div", "body");
    this.answerNode = element(mode === "chat" ? "div" : "span", "answer");
    if (mode === "chat") {
      this.node.append(element("div", "question", prompt));
      this.body.append(this.answerNode);
    } else {
      this.promptNode = element("span", "given", prompt);
      this.body.append(this.promptNode, this.answerNode);
    }
    this.error = element("p", "error");
    this.error.setAttribute("role", "alert");
    this.error.hidden = true;
    this.foot = element("div", "foot");
    this.figures = element("span", "figures");
    this.figures.title = "tokens/s: over the whole time of the answer, that of the prompt included";
    this.buttons = element("span", "buttons");
    this.foot.append(this.figures, this.buttons);
    this.node.append(this.body, this.error, this.foot);
  }

  /** An answer begins; with `keep` it goes on from the text that is there. */
  begin(seed, keep = false) {
    if (!keep) this.answer = "";
    this.seed = seed;
    this.clock = new Clock();
    this.error.hidden = true;
    this.buttons.replaceChildren();
    this.node.classList.add("writing");
    this.node.setAttribute("aria-busy", "true");
    this.show();
  }

  /** Show the answer as far as it is there. */
  show() {
    // A continuation is shown as it is; in an answer, what stands between ``` fences is code.
    if (this.mode === "completion") this.answerNode.textContent = this.answer;
    else showFenced(this.answerNode, this.answer);
    this.#showFigures();
  }

  #showFigures(ending = null) {
    const parts = [this.clock.text()];
    if (ending === null && this.clock.first === null) parts[0] += "…";
    if (ending !== null) parts.push(`seed ${this.seed}`);
    if (ENDINGS[ending]) parts.push(ENDINGS[ending]);
    if (ending !== null && this.leftOut) {
      parts.push(`without the first ${this.leftOut === 1 ? "question" : `${this.leftOut} questions`}: the context is full`);
    }
    this.figures.textContent = parts.join(" · ");
  }

  /** `ending`: stop, length or cancelled. */
  finish(ending) {
    this.#end();
    if (this.clock.first === null) this.figures.textContent = ending === "cancelled" ? "stopped" : "the answer is empty";
    else this.#showFigures(ending);
    this.offer(true);
  }

  fail(message) {
    this.#end();
    this.error.textContent = message;
    this.error.hidden = false;
    this.figures.textContent = this.answer ? this.clock.text() : "";
    this.offer(true);
  }

  #end() {
    this.show();
    this.node.classList.remove("writing");
    this.node.removeAttribute("aria-busy");
  }

  /** Show the buttons; in a chat only the last answer can be written again. */
  offer(isLast) {
    const { retry, edit, resume } = this.actions;
    const buttons = [];
    if (this.answer) buttons.push(this.#copyButton());
    if (this.mode === "completion" && this.answer) buttons.push(quietButton("Continue", () => resume(this), "asks"));
    if (this.mode === "completion" || isLast) {
      buttons.push(quietButton("Retry", () => retry(this), "asks"), quietButton("Edit", () => edit(this), "asks"));
    }
    this.buttons.replaceChildren(...buttons);
  }

  #copyButton() {
    const button = quietButton("Copy", async () => {
      const text = this.mode === "chat" ? this.answer : this.prompt + this.answer;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Copying is not allowed here";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    return button;
  }
}
