// The server's API, as far as the page needs it.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** fetch with the key, if there is one; a browser that was asked for it at the door sends it by itself. Paths are relative
 * to the page's, which a proxy may have put below a prefix. */
export async function call(path, { key, headers = {}, ...options } = {}) {
  const authorization = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...authorization, ...headers } });
  if (!answer.ok) throw new ApiError(answer.status, await message(answer));
  return answer;
}

async function message(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || `the server answers ${answer.status}`;
  }
}

/** Text of the lines of a body, without their ends. */
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.replace(/\r$/, "");
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {}); // it may have ended by itself
  }
}

/** Streams an answer: first { headers }, then { text }, { usage }, { finish } as they come. Throws ApiError. */
export async function* streamChat(body, { key, signal, fresh }) {
  const answer = await call("v1/chat/completions", {
    key, signal, method: "POST",
    headers: { "content-type": "application/json", ...(fresh ? { "cache-control": "no-cache" } : {}) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  yield { headers: answer.headers };
  for await (const line of lines(answer.body)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content;
    if (text) yield { text };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new ApiError(200, "the answer broke off before its end");
}
