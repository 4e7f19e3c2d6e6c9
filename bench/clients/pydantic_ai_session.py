"""pydantic-ai: typed output through a forced tool, and a tool that it runs."""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, key = sys.argv[1:]
model = OpenAIChatModel("scripted", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))


class Person(BaseModel):
    name: str
    age: int


assert Agent(model).run_sync("hi").output == "Hello from Rorqual!"
assert Agent(model, output_type=Person).run_sync("Ann is 30").output == Person(name="Ann", age=30)
agent = Agent(model)


@agent.tool_plain
def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


assert agent.run_sync("weather in Rome").output == "It is sunny in Rome."
