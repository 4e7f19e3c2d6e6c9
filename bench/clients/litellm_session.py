"""litellm through three of its providers: chat, stream, tools, and an error that keeps its message."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

url, key = sys.argv[1:]
said = [{"role": "user", "content": "hi"}]
for model, base in (
    ("openai/scripted", f"{url}/v1"),
    ("deepseek/scripted", url),
    ("hosted_vllm/scripted", f"{url}/v1"),
):
    answer = litellm.completion(model=model, messages=said, api_base=base, api_key=key)
    assert answer.choices[0].message.content == "Hello from Rorqual!", answer
    assert answer.usage.prompt_tokens > 0
    parts = litellm.completion(model=model, messages=said, api_base=base, api_key=key, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == "Hello from Rorqual!"
reasoned = litellm.completion(model="deepseek/scripted", messages=said, api_base=url, api_key=key)
assert reasoned.choices[0].message.reasoning_content == "A greeting."
tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
asked = [{"role": "user", "content": "weather in Rome"}]
answer = litellm.completion(
    model="openai/scripted", messages=asked, tools=[tool], api_base=f"{url}/v1", api_key=key
)
assert answer.choices[0].message.tool_calls[0].function.name == "weather"
message = ""
try:
    litellm.completion(model="openai/nope", messages=said, api_base=f"{url}/v1", api_key=key)
except litellm.NotFoundError as e:
    message = str(e)
assert "does not exist" in message
