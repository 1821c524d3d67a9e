// From the text of /metrics to what the charts show.

const PREFIX = "fastattn:";
const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;

/** name without prefix and _total → { value, buckets: [[upper bound, count], …], labels: Map(label text → value) }, series added up. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line[0] === "#" ? null : LINE.exec(line);
    if (!match || !match[1].startsWith(PREFIX)) continue;
    const value = Number(match[3]);
    const bucket = match[1].endsWith("_bucket");
    const name = match[1].slice(PREFIX.length).replace(bucket ? /_bucket$/ : /_total$/, "");
    if (!found.has(name)) found.set(name, { value: 0, buckets: new Map(), labels: new Map() });
    const entry = found.get(name);
    if (bucket) {
      const bound = Number(/(?:^|,)le="([^"]+)"/.exec(match[2])[1].replace("+Inf", "Infinity"));
      entry.buckets.set(bound, (entry.buckets.get(bound) ?? 0) + value);
    } else {
      entry.value += value;
      if (match[2]) entry.labels.set(match[2], (entry.labels.get(match[2]) ?? 0) + value);
    }
  }
  return found;
}

/** The quantile of what was observed between two samples of a histogram, in its unit; null if nothing was. */
export function quantile(now, before, q) {
  const bounds = [...now.buckets.keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => now.buckets.get(bound) - (before?.buckets.get(bound) ?? 0));
  const total = counts.at(-1);
  if (!(total > 0)) return null;
  const rank = q * total;
  const index = counts.findIndex((count) => count >= rank);
  const low = index > 0 ? bounds[index - 1] : 0;
  if (bounds[index] === Infinity) return low;
  const under = index > 0 ? counts[index - 1] : 0;
  return low + ((bounds[index] - low) * (rank - under)) / Math.max(counts[index] - under, 1e-9);
}

const sum = (entry, pattern) => [...(entry?.labels ?? [])].reduce((all, [label, value]) => all + (pattern.test(label) ? value : 0), 0);
const share = (part, whole) => (whole > 0 ? part / whole : null);

/**
 * What a chart shows for two samples { seconds, metrics } some seconds apart. A value is null where nothing happened between
 * them, and undefined where the server does not report it, in which case the chart is left out.
 */
export function figures(now, before) {
  const value = (name) => now.metrics.get(name)?.value;
  // Of several engines each has a share.
  const mean = (name) => (now.metrics.has(name) ? value(name) / Math.max(now.metrics.get(name).labels.size, 1) : undefined);
  const seconds = Math.max(now.seconds - before.seconds, 1e-3);
  const change = (name) => (now.metrics.has(name) ? Math.max(0, value(name) - (before.metrics.get(name)?.value ?? 0)) : undefined);
  const rate = (name) => (now.metrics.has(name) ? (now === before ? null : change(name) / seconds) : undefined);
  const ratio = (part, whole) => (now.metrics.has(whole) ? share(change(part), change(whole)) : undefined);
  const middle = (name, q) => (now.metrics.has(name) ? quantile(now.metrics.get(name), before.metrics.get(name), q) : undefined);
  const lookups = now.metrics.get("response_cache_lookups");
  const earlier = before.metrics.get("response_cache_lookups");
  const looked = (pattern) => sum(lookups, pattern) - sum(earlier, pattern);
  const answered = /outcome="(hit|joined|semantic)"/;
  return {
    running: value("num_requests_running"),
    waiting: value("num_requests_waiting"),
    generated: rate("generation_tokens"),
    prompt: rate("prompt_tokens"),
    kv: mean("kv_cache_usage_perc"),
    prefix: ratio("prefix_cache_hits", "prefix_cache_queries"),
    // Without speculation the counters stay at 0, and there is nothing to show.
    accepted: value("spec_decode_num_draft_tokens") > 0 ? ratio("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens") : undefined,
    cached: lookups ? share(looked(answered), looked(/outcome="(hit|joined|semantic|miss)"/)) : undefined,
    cachedCount: lookups ? sum(lookups, answered) : undefined,
    ttft: middle("time_to_first_token_seconds", 0.5),
    ttftWorst: middle("time_to_first_token_seconds", 0.95),
    itl: middle("inter_token_latency_seconds", 0.5),
    itlWorst: middle("inter_token_latency_seconds", 0.95),
  };
}
