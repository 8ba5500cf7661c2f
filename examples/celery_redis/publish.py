"""Has the workers of `album.py` make pages: pictures at the same time, then the page, which is published then.

    python publish.py

Prints:

    <published: cat.jpg@320, dog.jpg@320, owl.jpg@320>
    20 pages more, with 100 pictures
    the picture that was called back is not made: REVOKED
"""

from album import make_page, publish, resize
from celery import chord, group
from celery.exceptions import TaskRevokedError

animals = ["cat.jpg", "dog.jpg", "owl.jpg"]
page = chord((resize.s(picture, 320) for picture in animals), make_page.s() | publish.s())
print(page.delay().get(timeout=60))

pages = group(
    chord((resize.s(f"{number}.{index}.jpg", 640) for index in range(5)), make_page.s()) for number in range(20)
).delay()
made = pages.get(timeout=60)
print(len(made), "pages more, with", sum(page.count("@640") for page in made), "pictures")

waiting = resize.apply_async(("late.jpg", 320), countdown=5)
waiting.revoke()
try:
    waiting.get(timeout=60)
except TaskRevokedError:
    print("the picture that was called back is not made:", waiting.state)
