"""Gives the workers of `myapp.py` something to do: two of them have to run.

    python enqueue.py

Prints:

    2 workers are there
    5 + 10 = 15
    200 sums, each by one of them: 39800
    news.html at attempt 3
    tea is ready, not before its time
"""

import time

from myapp import add, app, fetch, remind

answers = app.control.inspect(timeout=2).ping() or {}
print(len(answers), "workers are there")

print("5 + 10 =", add.delay(5, 10).get(timeout=30))

results = [add.delay(number, number) for number in range(200)]
print("200 sums, each by one of them:", sum(result.get(timeout=30) for result in results))

print(fetch.delay("news.html").get(timeout=30))

asked = time.monotonic()
text = remind.apply_async(("tea is ready",), countdown=2).get(timeout=30)
print(f"{text}, {'not before its time' if time.monotonic() - asked >= 2 else 'too early'}")
