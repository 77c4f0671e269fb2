// The server's API: one answer as a stream of events.

/** The server refused or failed; message and code are its own. */
export class ApiError extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

/** Nothing answers at this address any more. */
export class LostServer extends Error {
  constructor() {
    super("The server does not answer. Is truthgpt demo still running?");
  }
}

/** GET a JSON document. */
export async function getJson(path) {
  const response = await reach(path, { cache: "no-store" });
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

/**
 * POST `body` and yield the JSON document of every server-sent event up to `[DONE]`.
 * Throws ApiError for a refusal, also one in the middle of the stream; LostServer when the connection breaks;
 * and what `signal` throws when the reader gives up.
 */
export async function* streamEvents(path, body, signal) {
  const response = await reach(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusalOf(response);
  for await (const data of events(response.body.getReader(), signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message ?? "the answer failed");
    yield event;
  }
  throw new LostServer(); // it ended without saying so
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new LostServer();
  }
}

async function refusalOf(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiError(error.message, error.code);
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`); // not from our API: nothing else to say
  }
}

/** The data of each event; an event ends with an empty line, its data may stand in several lines. */
async function* events(reader, signal) {
  const decoder = new TextDecoder();
  let waiting = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new LostServer();
    }
    if (chunk.done) return;
    waiting += decoder.decode(chunk.value, { stream: true }).replaceAll("\r\n", "\n");
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
