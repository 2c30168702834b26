// What the Vercel AI SDK does with the server: `node checks.mjs URL MODEL`. Ends with 1 where a check fails.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "quantserve",
  baseURL: url,
  apiKey: "sk-none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const asked = { model: provider(name), prompt: "What is the weather in Paris?", maxRetries: 0 };
const city = z.enum(["Paris", "Rome"]);
const tools = { get_weather: tool({ description: "The weather in a city", inputSchema: z.object({ city }) }) };

const chat = await generateText({ ...asked, maxOutputTokens: 8 });
assert.ok(chat.text);
assert.equal(chat.finishReason, "length");
assert.equal(chat.usage.outputTokens, 8);

const stream = streamText({ ...asked, maxOutputTokens: 8, onError: ({ error }) => { throw error; } });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.ok(text);
assert.equal((await stream.usage).outputTokens, 8);

const called = await generateText({ ...asked, tools, toolChoice: "required", maxOutputTokens: 64 });
assert.equal(called.toolCalls.length, 1);
assert.equal(called.toolCalls[0].toolName, "get_weather");
city.parse(called.toolCalls[0].input.city);

const named = { type: "tool", toolName: "get_weather" };
const calling = streamText({ ...asked, tools, toolChoice: named, maxOutputTokens: 64 });
const [call] = await calling.toolCalls;
city.parse(call.input.city);

const schema = z.object({ city, degrees: z.number().int().min(-50).max(60) });
const formed = await generateText({ ...asked, output: Output.object({ schema }), maxOutputTokens: 64 });
schema.parse(formed.output);

const embedding = await embedMany({ model: provider.embeddingModel(name), values: ["Paris", "Rome"], maxRetries: 0 });
assert.equal(embedding.embeddings.length, 2);

console.log("vercel ai sdk: chat, stream with usage, forced calls, answer by schema, embeddings");
