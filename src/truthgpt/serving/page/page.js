// The page: two logs (chat and completion), one composer, and what the server says about its model.

import { ApiError, LostServer, getJson, streamEvents } from "./api.js";
import { buildControls } from "./controls.js";
import { Entry, element } from "./entries.js";
import { shortNumber, showCurves, showFacts, showLargeCurves } from "./run_panel.js";

const RUN_REFRESH_MS = 10_000;
const LOST_RETRY_MS = 2_000;
const at = (id) => document.getElementById(id);

const controls = buildControls(at("controls"));
const logs = { chat: [], completion: [] };
let leftOut = 0; // entries at the chat's beginning that are no longer sent: the model's context has no room for them
let mode = "completion";
let about = null; // the last answer of /api/run
let writing = null; // { entry, abort } while an answer comes
let endCurves = null;
let refreshTimer = null;

// --- Asking ---------------------------------------------------------------------------------------------------------

const actions = {
  retry: (entry) => write(entry, false),
  resume: (entry) => write(entry, true),
  edit(entry) {
    if (entry.mode === "chat") {
      logs.chat = logs.chat.filter((other) => other !== entry);
      entry.node.remove();
      logs.chat.at(-1)?.offer(true);
    }
    at("prompt").value = entry.prompt;
    fitPrompt();
    at("prompt").focus();
    showMode();
  },
};

function send() {
  const text = at("prompt").value;
  if (writing || about === null || (mode === "chat" && !text.trim()) || text === "") return;
  at("prompt").value = "";
  fitPrompt();
  const entry = new Entry(mode, text, actions);
  if (mode === "chat") logs.chat.at(-1)?.offer(false);
  logs[mode].push(entry);
  at(`log-${mode}`).append(entry.node);
  showMode();
  scrollDown();
  write(entry, false);
}

/** What to ask for an entry; `keep` asks for more of the text that is there. */
function requestOf(entry, keep) {
  const sampling = { model: about.model.name, ...controls.values(), stream: true };
  sampling.stream_options = { include_usage: true };
  if (entry.mode === "completion") {
    return ["/v1/completions", { ...sampling, prompt: keep ? entry.prompt + entry.answer : entry.prompt }];
  }
  return ["/v1/chat/completions", { ...sampling, messages: messagesUpTo(entry) }];
}

/** The conversation with an entry's question as its last message. */
function messagesUpTo(entry) {
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: at("system").value }] : [];
  for (const earlier of logs.chat.slice(leftOut)) {
    if (earlier === entry) break;
    if (!earlier.answer) continue; // it failed: templates want question and answer in turn
    messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: earlier.answer });
  }
  return [...messages, { role: "user", content: entry.prompt }];
}

/** The events of an answer. A chat that has become too long for the model goes on without the older half of it. */
async function* answerEvents(entry, path, request, signal) {
  const before = leftOut;
  for (;;) {
    try {
      yield* streamEvents(path, request, signal);
      return;
    } catch (error) {
      const earlier = entry.mode === "chat" ? logs.chat.indexOf(entry) - leftOut : 0;
      if (error.code !== "context_length_exceeded" || earlier <= 0) {
        leftOut = before; // nothing that is asked next has to do without it for this
        throw error;
      }
      leftOut += Math.ceil(earlier / 2);
      entry.leftOut = leftOut;
      request.messages = messagesUpTo(entry);
    }
  }
}

/** Ask and write the answer into the entry as it comes. */
async function write(entry, keep) {
  const [path, request] = requestOf(entry, keep);
  writing = { entry, abort: new AbortController() };
  entry.begin(request.seed, keep);
  entry.leftOut = entry.mode === "chat" ? leftOut : 0;
  showBusy();
  let ending = "stop";
  let tokens = 0;
  const showSoon = oncePerFrame(() => follow(() => entry.show()));
  try {
    for await (const event of answerEvents(entry, path, request, writing.abort.signal)) {
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      // On the way an event with text is a token or so; the count at the end is exact.
      tokens = event.usage?.completion_tokens ?? tokens + (text ? 1 : 0);
      if (choice) entry.clock.note(tokens);
      else entry.clock.tokens = tokens;
      if (choice?.finish_reason) ending = choice.finish_reason;
      entry.answer += text;
      showSoon();
    }
    follow(() => entry.finish(ending));
    at("announcer").textContent = entry.answer || "The answer is empty.";
  } catch (error) {
    follow(() => endBadly(entry, error));
  } finally {
    showSoon.cancel();
    writing = null;
    showBusy();
  }
}

function endBadly(entry, error) {
  if (writing.abort.signal.aborted) entry.finish("cancelled");
  else if (error instanceof ApiError || error instanceof LostServer) entry.fail(error.message);
  else {
    entry.fail(`The page failed: ${error.message}`);
    throw error;
  }
  if (error instanceof LostServer) lost(error);
}

/** A fast model writes several tokens a frame: drawing each would hold up the reading, and so what is measured. */
function oncePerFrame(draw) {
  let frame = null;
  const soon = () => {
    frame ??= requestAnimationFrame(() => {
      frame = null;
      draw();
    });
  };
  soon.cancel = () => cancelAnimationFrame(frame);
  return soon;
}

function stop() {
  writing?.abort.abort();
}

// --- Showing --------------------------------------------------------------------------------------------------------

/** Change the log and keep its end in sight when it was in sight. */
function follow(change) {
  const scroller = at("scroller");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  change();
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

function scrollDown() {
  at("scroller").scrollTop = at("scroller").scrollHeight;
}

function showBusy() {
  const hadFocus = document.activeElement === at("stop");
  showMode();
  at("send").hidden = writing !== null;
  at("stop").hidden = writing === null;
  for (const button of document.querySelectorAll(".asks")) button.disabled = writing !== null; // one answer at a time
  if (writing) at("announcer").textContent = writing.entry.mode === "chat" ? "Answering" : "Continuing";
  if (hadFocus && !writing) at("prompt").focus();
}

function showMode() {
  for (const each of ["chat", "completion"]) {
    at(`mode-${each}`).checked = each === mode;
    at(`log-${each}`).hidden = each !== mode || logs[each].length === 0;
  }
  const chat = mode === "chat";
  document.body.dataset.mode = mode;
  at("system-section").hidden = !chat;
  at("new").textContent = chat ? "New chat" : "Clear";
  at("new").disabled = writing !== null || logs[mode].length === 0;
  at("prompt").placeholder = chat ? "Ask something" : "Write the beginning of a text";
  at("prompt-label").textContent = chat ? "Message" : "Prompt";
  at("welcome").hidden = logs[mode].length > 0;
  if (about === null) return;
  at("welcome-title").textContent = chat ? "Ask the model" : "Start a text, the model continues it";
  at("welcome-text").textContent = chat
    ? "It answers with what it learned in training. Check what matters."
    : about.model.chat_template
      ? "Here it goes on from your words alone, without its chat template."
      : "This model has no chat template, so it answers no questions: it continues what you begin, in the manner of what it was trained on.";
  const starters = chat ? [] : about.prompts;
  at("starters").hidden = starters.length === 0;
  at("starters").replaceChildren(...starters.map(starter));
}

/** A prompt the run itself sampled from while it trained. */
function starter(prompt) {
  const button = element("button", "starter", prompt);
  button.type = "button";
  button.addEventListener("click", () => {
    at("prompt").value = prompt;
    fitPrompt();
    send();
  });
  const item = element("li");
  item.append(button);
  return item;
}

/** As high as its text, for browsers without `field-sizing`. */
function fitPrompt() {
  const prompt = at("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function openPanel(open) {
  document.body.classList.toggle("panel-open", open);
  at("open-panel").setAttribute("aria-expanded", String(open));
  at("shade").hidden = !open;
  if (open) at("close-panel").focus();
  else at("open-panel").focus();
}

// --- The server's own words -----------------------------------------------------------------------------------------

function lost(error) {
  at("lost").textContent = error.message;
  at("lost").hidden = false;
  document.body.classList.add("is-lost");
  at("server-state").textContent = "not reachable";
  again(LOST_RETRY_MS);
}

function again(afterMs) {
  clearTimeout(refreshTimer);
  refreshTimer = setTimeout(refresh, afterMs);
}

/** Ask for model and curves; again later while the run still trains or the server is away. */
async function refresh() {
  let answer;
  try {
    answer = await getJson("/api/run");
  } catch (error) {
    lost(error);
    return;
  }
  const first = about === null;
  about = answer;
  at("lost").hidden = true;
  document.body.classList.remove("is-lost");
  const { model, run, curves } = about;
  at("model-name").textContent = document.title = model.name;
  at("server-state").textContent = `${shortNumber(model.parameters)} parameters on ${model.device}`;
  showFacts(at("facts"), about);
  controls.limitTokens(model.context_tokens);
  endCurves?.();
  endCurves = showCurves(at("curves"), curves);
  at("enlarge").hidden = endCurves === null;
  at("no-curves").hidden = endCurves !== null;
  at("no-curves").textContent = run ? "The run has logged nothing yet." : "A Hugging Face folder has no curves: these come with a run directory.";
  at("mode-chat").disabled = !model.chat_template;
  at("mode-chat").parentElement.title = model.chat_template ? "" : "This model has no chat template";
  if (first) mode = model.chat_template ? "chat" : "completion";
  if (first) showMode();
  if (run?.state === "running") again(RUN_REFRESH_MS);
}

function enlarge() {
  const dialog = at("large");
  dialog.showModal(); // before drawing: a hidden host has no width
  const end = showLargeCurves(at("large-curves"), about.curves);
  dialog.addEventListener("close", () => end(), { once: true });
}

// --- Wiring ---------------------------------------------------------------------------------------------------------

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("input", fitPrompt);
at("prompt").addEventListener("keydown", (event) => {
  // Enter that chooses a candidate of an input method is no sending.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || at("large").open) return;
  if (writing) stop();
  else if (document.body.classList.contains("panel-open")) openPanel(false);
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => {
  logs[mode] = [];
  if (mode === "chat") leftOut = 0;
  at(`log-${mode}`).replaceChildren();
  showMode();
  at("prompt").focus();
});
for (const each of ["chat", "completion"]) {
  at(`mode-${each}`).addEventListener("change", () => {
    mode = each;
    showMode();
    scrollDown();
  });
}
at("reset").addEventListener("click", () => controls.reset());
at("open-panel").addEventListener("click", () => openPanel(!document.body.classList.contains("panel-open")));
at("close-panel").addEventListener("click", () => openPanel(false));
at("shade").addEventListener("click", () => openPanel(false));
at("enlarge").addEventListener("click", enlarge);
at("close-large").addEventListener("click", () => at("large").close());

showMode();
refresh();
if (matchMedia("(pointer: fine)").matches) at("prompt").focus(); // on a phone it would open the keyboard
