// Jobs for llama.cpp, by node-llama-cpp: node llama_cpp.mjs NODE_MODULES JOBS.json ANSWERS.json
// A job is {path, tokens, texts}; its answer {probabilities, ids}, or {error}. Probabilities are
// [[token, probability], …] of the next token after each one.
import fs from "fs";
import {pathToFileURL} from "url";

const [modules, jobs, answers] = process.argv.slice(2);
const library = `${modules}/node-llama-cpp/dist/index.js`;
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(library));
const llama = await getLlama({
    gpu: false, build: "never", maxThreads: 2, logLevel: LlamaLogLevel.error,
});

async function answer({path, tokens, texts}) {
    const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
    const context = await model.createContext({
        contextSize: 128,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
    });
    const generateNext = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1}};
    const found = await context
        .getSequence()
        .controlledEvaluate(tokens.map((token) => [token, {generateNext}]));
    const ids = texts.map((text) => model.tokenize(text, false));
    await model.dispose();
    return {probabilities: found.map((each) => [...each.next.probabilities]), ids};
}

const found = [];
for (const job of JSON.parse(fs.readFileSync(jobs))) {
    try {
        found.push(await answer(job));
    } catch (error) {
        found.push({error: String(error)});
    }
}
fs.writeFileSync(answers, JSON.stringify(found));
process.exit(0);
