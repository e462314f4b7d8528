"""Stream a completion and a chat answer with the ``openai`` client: ``python examples/stream.py [URL]``.

Start a server first: ``outrider serve`` (no arguments: the embedded SmolLM2-135M-Instruct, no GPU needed).
"""

import sys

from openai import OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
    client = OpenAI(base_url=url, api_key="EMPTY")
    model = client.models.list().data[0].id

    for chunk in client.completions.create(
        model=model, prompt="San Francisco is a", max_tokens=20, temperature=0, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    question = {"role": "user", "content": "Name three rivers of Europe."}
    answer = client.chat.completions.create(
        model=model,
        messages=[question],
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in answer:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")


if __name__ == "__main__":
    main()
