// Vercel's AI SDK with the openai-compatible provider: text, stream, thought, tools.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const [url, key] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "rorqual", baseURL: `${url}/v1`, apiKey: key, includeUsage: true });
const model = provider("scripted");
const answer = await generateText({ model, prompt: "hi" });
assert.equal(answer.text, "Hello from Rorqual!");
assert.equal(answer.reasoningText, "A greeting.");
const stream = streamText({ model, prompt: "hi" });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, "Hello from Rorqual!");
const weather = tool({ description: "weather", inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } } }) });
const called = await generateText({ model, prompt: "weather in Rome", tools: { weather } });
assert.deepEqual(called.toolCalls[0].input, { city: "Rome" });
