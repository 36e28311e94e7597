// Embeds, continues and scores texts with llama.cpp: node llama_cpp.mjs MODEL INPUT OUTPUT
// INPUT: {"embed": [text], "continue": [text], "score": [text], "cache": "F16" or "F32"};
// node-llama-cpp is found from the folder that the script is run in. Pooling is what the file says.
import {createRequire} from "node:module";
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(found));
const [modelPath, input, output] = process.argv.slice(2);
const asked = JSON.parse(readFileSync(input, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(process.env.LLAMA_THREADS ?? 0)});
const precise = asked.cache === "F32" ? {
    defaultContextFlashAttention: false,
    experimentalDefaultContextKvCacheKeyType: "F32",
    experimentalDefaultContextKvCacheValueType: "F32"
} : {};
const model = await llama.loadModel({modelPath, gpuLayers: 0, ...precise});
const result = {release: llama.llamaCppRelease.release, embed: [], tokens: [], continue: [], score: []};

if (asked.embed?.length) {
    const context = await model.createEmbeddingContext({contextSize: 512});
    for (const text of asked.embed) {
        result.tokens.push(model.tokenize(text));
        result.embed.push(Array.from((await context.getEmbeddingFor(text)).vector));
    }
    await context.dispose();
}
const context = await model.createContext({contextSize: 1024, batchSize: 512});
const sequence = context.getSequence();
for (const text of asked.continue ?? []) {
    await sequence.clearHistory();
    const tokens = [];
    for await (const token of sequence.evaluate(model.tokenize(text), {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === 40) break;
    }
    result.continue.push({tokens, text: model.detokenize(tokens)});
}
for (const text of asked.score ?? []) {
    await sequence.clearHistory();
    const tokens = model.tokenize(text).slice(0, 512);
    const items = tokens.slice(0, -1).map((token, i) => [token, {
        generateNext: {logits: {filter: {tokens: [tokens[i + 1]], includeMax: true}}, totalLogitWeight: true}
    }]);
    let sum = 0;
    const steps = await sequence.controlledEvaluate(items);
    steps.forEach(({next}, i) => {
        const top = Math.max(...next.logits.values());
        sum += next.logits.get(tokens[i + 1]) - top - Math.log(next.totalLogitWeight);
    });
    result.score.push({tokens: items.length, logLikelihood: sum});
}
writeFileSync(output, JSON.stringify(result));
process.exit(0);
