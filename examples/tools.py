"""A tool call and its answer with the ``openai`` client: ``python examples/tools.py [URL]``.

The server needs no flag for it. The model asks for the weather, this program looks it up, the model answers.
"""

import json
import sys

from openai import OpenAI

WEATHER = {"Paris": "18 degrees, light rain", "Lima": "24 degrees, sunny"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": sorted(WEATHER)}},
                "required": ["city"],
            },
        },
    }
]


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = OpenAI(base_url=url, api_key="EMPTY")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]

    first = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice="required", max_tokens=100
    )
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        city = json.loads(call.function.arguments)["city"]
        print(f"{call.function.name}({city!r}) -> {WEATHER[city]}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": WEATHER[city]})

    second = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, max_tokens=100)
    print(second.choices[0].message.content)


if __name__ == "__main__":
    main()
