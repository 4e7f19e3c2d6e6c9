"""langchain-openai: invoke, stream, tools and structured output."""

import sys

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, key = sys.argv[1:]


class Person(BaseModel):
    name: str
    age: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


model = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model="scripted")
assert model.invoke("hi").content == "Hello from Rorqual!"
assert "".join(c.content for c in model.stream("hi")) == "Hello from Rorqual!"
first = model.bind_tools([weather]).invoke("weather in Rome")
assert first.tool_calls[0]["args"] == {"city": "Rome"}
history = [("user", "weather in Rome"), first, ToolMessage("sunny", tool_call_id=first.tool_calls[0]["id"])]
assert model.bind_tools([weather]).invoke(history).content == "It is sunny in Rome."
assert model.with_structured_output(Person).invoke("Ann is 30") == Person(name="Ann", age=30)
