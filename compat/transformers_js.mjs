// Embeds texts with an exported graph in transformers.js; in Node and in a browser alike.
//
// In Node: node transformers_js.mjs FOLDER TEXTS OUTPUT DTYPE, where @huggingface/transformers is.

export async function embed(library, folder, texts, dtype) {
  const { AutoModel, AutoTokenizer } = library;
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModel.from_pretrained(folder, { dtype });
  const rows = async (batch) => {
    const inputs = tokenizer(batch, { padding: true, truncation: true });
    return (await model(inputs)).sentence_embedding.tolist();
  };
  const alone = [];
  for (const text of texts) alone.push(...(await rows([text])));
  return { embeddings: await rows(texts), alone };
}

if (typeof process !== "undefined" && process.argv[1]?.endsWith("transformers_js.mjs")) {
  const fs = await import("node:fs");
  const path = await import("node:path");
  const [folder, texts, output, dtype] = process.argv.slice(2);
  const library = await import("@huggingface/transformers");
  library.env.allowRemoteModels = false;
  library.env.localModelPath = path.dirname(folder);
  const given = JSON.parse(fs.readFileSync(texts, "utf-8"));
  const arrays = await embed(library, path.basename(folder), given, dtype);
  // The most that this process ever held, in MB; on Linux.
  const status = fs.existsSync("/proc/self/status") && fs.readFileSync("/proc/self/status", "utf-8");
  const memory = status ? Math.round((status.match(/VmHWM:\s*(\d+)/)[1] * 1024) / 1e6) : null;
  fs.writeFileSync(output, JSON.stringify({ arrays, memory, version: library.env.version }));
}
