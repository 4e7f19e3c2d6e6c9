"""langchain-deepseek: the thought is kept beside the answer."""

import sys

from langchain_deepseek import ChatDeepSeek

url, key = sys.argv[1:]
model = ChatDeepSeek(api_base=url, api_key=key, model="scripted")
answer = model.invoke("hi")
assert answer.content == "Hello from Rorqual!"
assert answer.additional_kwargs["reasoning_content"] == "A greeting."
assert "".join(c.content for c in model.stream("hi")) == "Hello from Rorqual!"
