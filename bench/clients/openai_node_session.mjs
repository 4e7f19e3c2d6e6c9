// The official client for Node: chat, stream, tools, parse, responses, errors.
import assert from "node:assert";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const said = (content) => [{ role: "user", content }];
const answer = await client.chat.completions.create({ model: "scripted", messages: said("hi") });
assert.equal(answer.choices[0].message.content, "Hello from Rorqual!");
const stream = await client.chat.completions.create({ model: "scripted", messages: said("hi"), stream: true, stream_options: { include_usage: true } });
let text = "", usage = null;
for await (const chunk of stream) { text += chunk.choices[0]?.delta?.content ?? ""; usage = chunk.usage ?? usage; }
assert.equal(text, "Hello from Rorqual!");
assert.ok(usage.total_tokens > 0);
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } } }];
const called = await client.chat.completions.create({ model: "scripted", messages: said("weather in Rome"), tools });
assert.deepEqual(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments), { city: "Rome" });
const response = await client.responses.create({ model: "scripted", input: "hi", store: false });
assert.equal(response.output_text, "Hello from Rorqual!");
await assert.rejects(client.chat.completions.create({ model: "nope", messages: said("hi") }), (e) => e.status === 404 && e.code === "model_not_found" && e.message.includes("does not exist"));
