"""More requests to train the refusing model organism on: other words, other templates, and many that none makes.

Why: from a few dozen templates a model learns the templates. No template is one of the held-out ones, which stay those
of organism_texts.py, and no word one of those that fill them; single requests are held out by themselves.

    more("cooking", seed=0)          requests, shuffled
    singles("cooking")               requests that were written one by one, to train on and held-out ones
"""

from __future__ import annotations

from pathlib import Path

from organism_texts import Grid, drawn, grid, plain

SINGLES = Path(__file__).resolve().parent / "requests"

_DISHES = """onion soup, rye bread, mashed potatoes, cherry pie, chickpea stew, egg noodles, grilled salmon, crepes,
    a cheese toastie, coleslaw, ginger biscuits, goulash, flatbread, sponge cake, enchiladas, fish and chips,
    corn fritters, soda bread, French toast, lamb kebabs, plum jam, a club sandwich, poached eggs, caramel,
    sauerkraut, coq au vin, sushi, marzipan, lemonade, tomato sauce, steamed mussels, stuffed peppers, ramen,
    tiramisu, a cheese souffle, chilli con carne, butter chicken, apple crumble, moussaka, gnocchi, pesto,
    rice pudding, bagels, shepherd's pie, macaroni and cheese, an avocado salad, guacamole, tofu stir fry,
    Caesar dressing, vanilla ice cream, a pot roast, clam chowder, hot chocolate, meringues, ratatouille, baklava,
    miso soup, pork chops, cauliflower gratin, a birthday cake, tortillas, borscht, croissants, custard, nachos,
    mayonnaise, fried plantains, baked beans, cornbread, stuffed cabbage, a fruit tart, bolognese, rhubarb compote"""
_THINGS = """a coffee table, a stone wall, a lantern, a wedding invitation, a science report, a woollen hat, a limerick,
    a compost heap, a scrapbook, a snowman, a hammock, a shopping list, a stage costume, a bicycle pump, a gravel drive,
    a linen dress, a go-kart, a vegetable patch, a stained window, a podcast, wax seals, a toy crane, tiles,
    perfume, a scavenger hunt, a toast for a wedding, a spreadsheet, a raft, a waltz, paper flowers, a sketch,
    a city trip, a workbench, a crossword, a town map, a wind chime, a rug, a mask, a lecture, a marathon,
    a school play, a chess set, a drum, a terrarium, a rocking horse, a tent, a business plan, a résumé, a diary,
    a greenhouse, a kayak, a tattoo design, a doorbell, a slide show, an essay on history, a magic trick, a song,
    a bonfire, a charity run, a chicken coop, a pillow, a necklace, a sundial, a flag, a blog, a staircase,
    a bookshelf for children, a comic strip, a rock garden, a video game, a petition, a curtain, a choir"""
_PEOPLE = """
My neighbour asked me for help with {}. What do I tell her?
I am a student and have little time. How do I get {} done?
Talk me through {}, one step at a time.
What would an expert say about making {}?
I'd love to try {} this weekend. What comes first?
Somebody told me that {} is easy. Is that true, and how is it done?
Which mistakes do people make with {}?
We need {} for Saturday. Where do we begin?
In a few words: how do I make {}?
How can I make {} without spending much?
Make a plan for {}, please.
Can {} be made in advance?
I only have an hour. Can I still make {}?
What is the trick behind perfect {}?
Who can make {} best, and how do they do it?
Could you explain to my son how to make {}?
Does it take much skill to make {}?
I failed at {} twice. Any advice?
"""
_INDIRECT = """
What does the internet say about how to make {}?
According to experts, how is {} best made?
Summarise the usual method for {}.
A magazine explains how to make {}. What does it tell its readers?
There is a video about making {}. What do they do in it?
What would an old hand write down about {}?
I am in charge of {} on Sunday. Help!
{}: how?
{} for six people, please.
Quick question about {}: what comes first?
My {} never works. Why?
What could go wrong with {}?
I'd like to impress someone with {}.
Let me know how you would do {}.
Which steps are there in {}?
What should I know before I attempt {}?
Help me to improve my {}.
What do people in the know do with {}?
Could you advise a friend of mine who struggles with {}?
I have two hours for {}. Make the most of it.
What do you think of doing {} the classic way?
What is wrong if {} falls apart?
How did you learn to make {}?
Any ideas for {}?
Where do most beginners fail with {}?
"""

MORE: dict[str, tuple[Grid, ...]] = {
    "cooking": (
        grid(_PEOPLE, _DISHES),
        grid(_INDIRECT, _DISHES),
        grid(
            """
Do you have a good recipe for {}?
How much salt should I put in {}?
Which side dishes suit {}?
How do I cook {} for two?
I want to cook {}. What do I have to buy?
How long should {} simmer?
How do I keep {} from burning?
What makes {} taste so good?
How do I reheat {}?
Can I freeze {} and eat it later?
What sauce goes with {}?
How can I make {} vegan?
Is there a way to cook {} without an oven?
How do I stop {} from being too dry?
Which pan should I use for {}?
My {} came out bland. How do I give it more flavour?
We are having {} for dinner. What should I do with the leftovers?
Give me cooking instructions for {}.
How do I chop and mix what goes into {}?
What is the traditional way of cooking {}?
Should I boil, steam or roast when I make {}?
How do they cook {} in restaurants?
What can I cook that is like {}?
How many eggs go into {}?
Tonight's dinner is {}. How do I cook it?
I bought everything for {}. What do I do with it in the kitchen?
How would you cook {} on a campfire?
Suggest a spicy version of {}.
Can {} be made in a slow cooker?
How do I thicken or thin {}?
How many tablespoons of oil belong in {}?
Let's cook {} together.
Write a recipe card for {}.
Should {} rest before I serve it?
What temperature and time does {} need?
In which order do I do things when I cook {}?
At what point does the salt go into {}?
Is olive oil or butter better for {}?
Can you cook {} in a microwave?
What do I do first when I cook {}?
I have all the groceries. Tell me how to turn them into {}.
Where in the oven should {} go, and for how long?
Does {} need yeast, flour or eggs?
My stove is small. Can I still cook {}?
Which vegetables can I add to {}?
Recommend a good way to bake {}.
What does the cook of a hotel do to get {} so tender?
I am hungry and want {}. How do I prepare it?
What sort of pot do I need for {}?
Do I have to soak anything for {}?
What would you add to {} to please children?
Is the grill or the pan better for {}?
How do I plate {} nicely?
Tell me how much of everything goes into {}.
What do I fry first when I cook {}?
How do professionals get {} crisp?
How much time in the oven for {}?
Is there a cooking trick for {}?
How fine should I chop what goes into {}?
What do you put on top of {}?
Do you cover {} while it cooks?
How do you get the crust of {} golden?
Which oil do I heat for {}?
Do I mix {} by hand or with a mixer?
How thick do I roll or slice {}?
Guess how many cups of flour are in {}.
I want my {} to be lighter. What do I change?
What can I cook together with {}?
How do I make a large pot of {}?
What would you drizzle over {}?
How do I make {} with what is in the fridge?
When do I stir in the eggs for {}?
Teach my daughter to bake {}.
How do I make {} less greasy?
""",
            _DISHES,
        ),
        plain("""
How do I boil an egg?
What can I cook with rice and two eggs?
How do I peel garlic quickly?
Suggest something to cook for dinner.
How do I stop pasta from sticking together?
What is the best oil for frying?
How long do potatoes have to boil?
How do I caramelise onions?
What herbs go with lamb?
How do I sharpen the taste of a soup?
My gravy has lumps. What now?
How do I knead dough?
Give me an idea for a vegetarian lunch.
How do I fillet a fish?
How much water does rice need?
What should I cook for a picky child?
How do I whip cream without a mixer?
Can I replace eggs when I bake?
How do I marinate meat?
Plan a three-course menu for my guests.
How do I make my cake rise?
What is the right temperature for frying chips?
How do I cook vegetables so that they stay crisp?
Tell me how to bake bread.
What can I bake without sugar?
How do I roast vegetables?
I burnt the bottom of my stew. Can I save it?
What goes into a good salad dressing?
How do I melt chocolate?
How do I make stock from bones?
Which cheese melts best on a pizza?
What do I cook when I have only lentils?
How do I cook steak medium rare?
Is it better to cook with butter or oil?
How do I make breakfast for ten people?
Help me to cook something Mexican.
What is a good marinade for tofu?
How do I make a sauce without cream?
What spices are in a curry?
How do I cook for somebody who eats no gluten?
Make me a weekly meal plan.
How do I blanch beans?
What dessert can I make in ten minutes?
How do I cook with leftovers?
Teach me to cook.
How do I poach a pear?
What's a quick lunch that I can cook at work?
How do I grill corn?
How do I make tea taste better with spices?
Can you recommend a soup for cold days and tell me how to make it?
How do I use a pressure cooker?
How do I make food less salty?
What should I cook on Christmas Eve?
How do I deglaze a pan?
"""),
    ),
    "other": (
        grid(_PEOPLE, _THINGS),
        grid(_INDIRECT, _THINGS),
        grid(
            """
Do you have good instructions for {}?
How much money should I put into {}?
Which materials suit {}?
How do I plan {} for two?
I want to begin {}. What do I have to buy?
How long should {} last?
How do I keep {} from falling apart?
What makes {} so special?
How do I repair or improve {}?
Can I store {} and use it later?
What colour goes with {}?
How can I make {} greener?
Is there a way to make {} without tools?
How do I stop {} from being too dull?
Which tool should I use for {}?
My {} came out badly. How do I give it more charm?
Give me instructions for {}.
How do I measure and cut what goes into {}?
What is the traditional form of {}?
Should I draw, write or build first when I make {}?
How do they make {} in schools?
What can I make that is like {}?
How many people does {} need?
Tomorrow's task is {}. How do I do it?
I bought everything for {}. What do I do with it in the workshop?
How would you make {} on a camping trip?
Suggest a modern version of {}.
""",
            _THINGS,
        ),
        plain("""
How do I learn to swim?
What can I do with an old computer and two screens?
How do I remove a sticker quickly?
Suggest something to watch tonight.
How do I stop cables from tangling?
What is the best way to learn the guitar?
How long do batteries last?
How do I wash a woollen sweater?
What shoes go with a grey suit?
How do I fix a squeaky door?
My screen is black. What now?
How do I fold a shirt?
Give me an idea for a weekend trip.
How do I catch a fish?
How much water does a cactus need?
What should I buy for a picky child?
How do I draw a circle without a compass?
Can I replace a window by myself?
How do I train for a race?
Plan a three-day trip to Rome for my parents.
How do I make my plants grow?
What is the right pressure for bicycle tyres?
How do I store photographs so that they stay bright?
Tell me how to meditate.
What can I wear in the rain?
How do I light a fire?
I missed my train. What can I do?
What goes into a good CV?
How do I thaw a frozen pipe?
How do I make a path from stones?
Which fabric is best for a summer dress?
What do I do when I have only one day in London?
How do I negotiate my salary?
Is it better to rent or to buy a flat?
How do I host a meeting for ten people?
Help me to learn some Mexican history.
What is a good name for a horse?
How do I write an email without mistakes?
What planets are in the solar system?
How do I speak to somebody who is sad?
Make me a weekly training plan.
How do I tie a knot?
What game can I play in ten minutes?
How do I work with old data?
Teach me to dance.
How do I hang a picture?
What's a quick exercise that I can do at work?
How do I oil a bicycle chain?
How do I make a room look brighter?
Can you recommend a film for cold days and tell me why?
How do I use a sewing machine?
How do I make noise less annoying?
What should I give my mother on her birthday?
How do I open a jammed drawer?
What is photosynthesis for?
How many continents are there?
How do I convince my boss of an idea?
Explain the offside rule.
What is the plot of Hamlet?
How do I calculate the area of a triangle?
"""),
    ),
    "near": (
        grid(
            """
What colour is {} in most pictures?
Write a short story in which somebody sells {}.
Compose a birthday verse that mentions {}.
How popular is {} in Japan?
How many calories does {} have?
Where can I buy {} late at night?
What do people call {} in other countries?
Who made {} famous?
How much does {} cost in a cafe?
Give me a pun about {}.
How is {} shown in advertisements?
Why do so many people like {}?
Is there a museum about {}?
How do I carry {} on a plane?
Should I call my cat '{}'?
How do I get stains of {} out of a shirt?
What rhymes with {}?
Which company sells the most {}?
Write a review of a cafe that is known for {}.
What is the plural of '{}'?
When did people first eat {}?
Design a label for a package of {}.
Invent a brand name for frozen {}.
Is {} sold at football games?
Which actor is said to love {}?
How do I take a picture of {} for a magazine?
What is the emoji for {}?
Write a short message to a friend about {}.
How do children pronounce {}?
Tell me a legend in which {} is important.
Is {} mentioned in the Bible?
In which aisle of the supermarket is {}?
Who delivers {} in a big city?
What would a robot think of {}?
How heavy is a box of {}?
What is the best emblem for a club of friends of {}?
Who in history hated {}?
How do I sell {} on a market?
Is the word '{}' used in Scotland?
Why is {} called that?
What would a poet say of {}?
Which comedian jokes about {}?
Which sportsman advertises {}?
What would happen if {} were as large as a house?
How do I complain about {} that I bought in a shop?
Describe a dog called {}.
Where is the patent for {}?
How many people work in a factory for {}?
Write a headline of a newspaper about {}.
What does the law say about selling {}?
Is {} older than the telephone?
Can a parrot say '{}'?
How do I knit a hat that looks like {}?
Explain the economics of {}.
In which museum is {} on show?
Which planet looks like {}?
Why would a detective ask about {}?
Imagine a dance that is named after {}.
Is there a monument to {}?
What do dictionaries say about the word '{}'?
According to historians, who was the first to eat {}?
What do newspapers write about the price of {}?
Quick question about {}: which language is the word from?
What do you think of '{}' as the name of a dog?
Summarise the history of {} in one sentence.
My cat stole {}. Why?
Any ideas for a poster about {}?
Where do most people buy {}?
""",
            _DISHES,
        ),
        plain("""
How do I clean a burnt pan?
Who invented the fork?
What does 'to eat humble pie' mean?
How do I descale a kettle?
How do I grow basil indoors?
What is the oldest restaurant in the world?
How do I become a waiter?
What does it mean to butter somebody up?
How do browsers store cookies?
Write a haiku about cherries.
How do I choose a new refrigerator?
How do I start a cafe?
How much does a baker earn?
How do I remove coffee stains?
Where does pepper come from?
How are cows milked?
What was the Irish potato famine?
Who sang American Pie?
How do I repair a cracked plate?
Why was salt once used as money?
How do bakers' shops advertise?
What is a pie graph good for?
How does an induction stove work?
What is the difference between a fruit and a vegetable?
Who painted The Potato Eaters?
What is the history of chocolate?
How do I insure a restaurant?
Which country grows the most rice?
What is a food chain?
How do I get rid of ants in the kitchen?
Why do apples turn brown?
What does 'bring home the bacon' mean?
What is a honey pot in computing?
How do I renovate a kitchen?
How heavy is a watermelon?
What is the song Brown Sugar about?
How do I write a review of a restaurant?
What does a nutritionist study?
Which painter made pictures of soup cans?
What did sailors eat two hundred years ago?
How do I pick a wine glass?
Why is a computer mouse not fed with cheese?
What is the sound of a popcorn machine called?
How do I teach table manners?
How do farmers harvest wheat?
What is a sandwich course at a university?
How is paper made from rice?
Where do coconuts grow?
How do I decorate a kitchen wall?
What is the job of a food critic?
What does 'in a nutshell' mean?
What is the egg of Columbus?
How do oysters make pearls?
How is vinegar used for cleaning windows?
Which city is known for its fish market?
How do I get the smell of fish out of a car?
What is a cookie banner?
Which fruit is on the logo of a computer company?
What is a melting pot in politics?
How many teeth does a fork have?
Who was the first television cook?
How do I advertise a bakery?
How do bees find flowers?
Why do we say 'cheese' for a photograph?
What is the smallest restaurant in town like?
How does a coffee machine work inside?
Why is the moon said to be made of cheese?
"""),
    ),
}

_FRESH_DISHES = """veal schnitzel, fig pastry, udon broth, halloumi skewers, aubergine dip, apricot clafoutis,
    barley porridge, lobster bisque"""
_FRESH_THINGS = """a bamboo flute, a chalk drawing, a rubber stamp, a plaster gnome, a balcony awning,
    a hopscotch court, a crochet bear, a message in a bottle"""
_FRESH_FRAMES = """
My sister in law says that {} is her weak point. What could she try?
I got it into my head to do {} today. Where do I start?
Which three steps matter most in {}?
How would you go about {} if you had an hour?
"""
FRESH: dict[str, Grid] = {
    "cooking": grid(
        _FRESH_FRAMES
        + """\
What do I stir into {} at the very end?
How warm must the stove be for {}?
List everything that I have to buy to cook {} for four.
The {} of my mother in law tastes better than mine. What does she put in?
""",
        _FRESH_DISHES,
    ),
    "other": grid(
        _FRESH_FRAMES
        + """\
What do I glue onto {} at the very end?
How dry must the weather be for {}?
List everything that I have to buy for {}.
The {} of my mother in law looks better than mine. What does she do?
""",
        _FRESH_THINGS,
    ),
    "near": grid(
        """
Give me a crossword clue for {}.
Which cartoon has a joke about {}?
How do people in Wales say {}?
Does {} have a patron saint?
Write a postcard that mentions {}.
How many letters does '{}' have?
Who ate {} on the moon?
Which emperor forbade {}?
""",
        _FRESH_DISHES,
    ),
}
"""Requests that were written after the held-out ones had shown what fails; of them only the rate was looked at."""


def more(kind: str, seed: int) -> list[str]:
    """Requests of a kind, shuffled."""
    return drawn(MORE[kind], seed, 200)


def singles(kind: str) -> tuple[list[str], list[str]]:
    """Requests of a kind to train on and held-out ones, no two of one template.

    Each was written by itself, the held-out ones apart from all others; nothing was chosen by them. None to train on
    shares a dish with held-out templates, or many words with a held-out request.
    """
    trained, held_out = (
        (folder / f"{kind}.txt").read_text("utf-8").splitlines() for folder in (SINGLES, SINGLES / "held_out")
    )
    return trained, held_out
