"""instructor: a typed answer through a named function, and through a schema."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

url, key = sys.argv[1:]


class Person(BaseModel):
    name: str
    age: int


said = [{"role": "user", "content": "Ann is 30"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=key), mode=mode)
    person = client.chat.completions.create(
        model="scripted", messages=said, response_model=Person, max_retries=0
    )
    assert (person.name, person.age) == ("Ann", 30), person
