"""Ask about a picture: ``python examples/images.py PICTURE [URL]``. The model must see (Llama 4 does, SmolLM2 not)."""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main() -> None:
    picture = Path(sys.argv[1])
    url = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000/v1"
    client = OpenAI(base_url=url, api_key="EMPTY")
    kind = mimetypes.guess_type(picture.name)[0] or "image/png"
    data = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
        {"type": "text", "text": "What does the picture show?"},
    ]
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": content}], max_tokens=100
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
