"The server as its clients meet it: a process of its own, the real openai client, raw HTTP, people who leave, ctrl-C"
import base64, http.client, json, os, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import pytest
from flow2lab.files import project_path

openai = pytest.importorskip('openai', reason='the openai client is not installed: pip install -e ".[dev]"')
pytest.importorskip('uvicorn', reason='the server is not installed: pip install -e ".[serve]"')
ROOT = Path(__file__).resolve().parents[1]
TOKEN, HF, SECRET = 'canary-of-the-door-7f3a', 'hf_canaryOfTheHub0123456789', 'canary in what somebody wrote'
MAIN = ('import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
        'from flow2lab.cli import main; sys.exit(main())')

class Serving:
    "`flow2lab serve` on a free port, its output in files"
    def __init__(self, folder, model, *args, token='', **env):
        self.out, self.err, self.token = folder/'out.txt', folder/'err.txt', token
        self.env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_TOKEN': HF,
                    **({'FLOW2LAB_TOKEN': token} if token else {}), **env}
        self.command = [sys.executable, '-c', MAIN, 'serve', str(model), '--port', '0', *map(str, args)]
        self.start()
    def start(self):
        with open(self.out, 'wb') as o, open(self.err, 'wb') as e:
            self.p = subprocess.Popen(self.command, cwd=ROOT, stdout=o, stderr=e, env=self.env)
        return self
    def running(self):
        "Itself, started again if a test has stopped it: tests come in any order"
        return self if self.p.poll() is None else self.start().ready()
    def ready(self):
        end = time.time()+120
        while ' on http://' not in self.out.read_text():
            assert self.p.poll() is None and time.time()<end, self.err.read_text()[-2000:]
            time.sleep(.05)
        self.port = int(self.out.read_text().split(' on http://')[1].split(' ')[0].rsplit(':', 1)[1])
        return self
    def client(self, **kw):
        return openai.OpenAI(base_url=f'http://127.0.0.1:{self.port}/v1', api_key=self.token or 'none',
                             max_retries=0, timeout=60, **kw)
    def ask(self, method, path, body=None, **head):
        "(status, JSON or text) of one raw request"
        c = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        if self.token: head = {'Authorization': f'Bearer {self.token}', **head}
        c.request(method, path, json.dumps(body) if isinstance(body, (dict, list)) else body,
                  {k: v for k,v in head.items() if v is not None})
        r = c.getresponse(); text = r.read().decode(); c.close()
        return r.status, json.loads(text) if r.headers['content-type']=='application/json' else text
    def stream(self, body):
        "A connection on which the first piece of an endless answer has come"
        c = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        c.request('POST', '/v1/completions', json.dumps(body), {'Authorization': f'Bearer {self.token}'})
        c.answer = c.getresponse(); assert c.answer.status==200; c.answer.readline()
        return c
    def stop(self, sig=signal.SIGINT):
        if self.p.poll() is None: self.p.send_signal(sig)
        return self.p.wait(20)

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "Two servers, started side by side: the shipped nano, and a model that never stops on one row behind a token"
    from flow2lab.load import load_model, load_tokenizer
    folder = tmp_path_factory.mktemp('endless'); m = load_model('transformer-micro', seed=0, vocab=724)
    m.config.max_position_embeddings = 20000
    m.save_pretrained(folder/'endless'); load_tokenizer('nano').save_pretrained(folder/'endless')
    a = Serving(tmp_path_factory.mktemp('nano'), 'nano')
    b = Serving(tmp_path_factory.mktemp('door'), folder/'endless', '--rows', 1, '--queue', 1, '--time-limit', 3,
                '--host', '0.0.0.0', '--allow-origin', 'https://a.example', token=TOKEN)
    try: yield a.ready(), b.ready()
    finally:
        for s in (a, b):
            if s.p.poll() is None: s.p.kill(); s.p.wait()

@pytest.fixture
def nano(both): return both[0].running()
@pytest.fixture
def door(both): return both[1].running()
ENDLESS = dict(model='endless', prompt=SECRET, max_tokens=15000, temperature=0)

def chat(q): return dict(model='nano', temperature=0, messages=[dict(role='user', content=q)])

def test_openai_client_gets_what_transformers_generates(nano):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = project_path('data/models/nano/nano')
    tok, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype='float32')
    ends = tok.convert_tokens_to_ids(['<|im_end|>', '<|endoftext|>']); client = nano.client()
    for q in ('What is 12 plus 30?', 'What is 81 plus 18?', 'Which is largest: 12, 90, 33 or 4?'):
        x = tok.apply_chat_template(chat(q)['messages'], add_generation_prompt=True,
                                    return_tensors='pt', return_dict=True)
        y = [t for t in model.generate(**x, do_sample=False, max_new_tokens=40,
                                       eos_token_id=ends)[0, x['input_ids'].shape[1]:].tolist() if t not in ends]
        r = client.chat.completions.create(**chat(q), max_tokens=40)
        assert (r.choices[0].message.content==tok.decode(y, skip_special_tokens=True)
                and r.choices[0].finish_reason=='stop')
        assert (r.usage.prompt_tokens, r.usage.completion_tokens)==(x['input_ids'].shape[1], len(y))
        parts = list(client.chat.completions.create(**chat(q), max_tokens=40, stream=True,
                                                    stream_options=dict(include_usage=True)))
        assert (''.join(c.choices[0].delta.content or '' for c in parts if c.choices)==r.choices[0].message.content
                and parts[-1].usage==r.usage)
        prompt = tok.apply_chat_template(chat(q)['messages'], add_generation_prompt=True, tokenize=False)
        assert (client.completions.create(model='nano', prompt=prompt, max_tokens=40, temperature=0).choices[0].text
                ==r.choices[0].message.content)

def test_openai_client_settings(nano):
    client = nano.client()
    ask = lambda **kw: client.completions.create(
        **{**dict(model='nano', prompt='Ada', max_tokens=30, temperature=1.5), **kw})
    assert [m.id for m in client.models.list()]==['nano'] and client.models.retrieve('nano').id=='nano'
    assert ask(seed=3).choices[0].text==ask(seed=3).choices[0].text!=ask(seed=4).choices[0].text
    whole = ask(seed=3).choices[0].text; stop = whole[3:5]
    assert ask(seed=3, stop=[stop]).choices[0].text==whole[:whole.index(stop)]
    r = ask(max_tokens=2, temperature=0); assert (r.usage.completion_tokens, r.choices[0].finish_reason)==(2, 'length')
    for bad, param in ((dict(temperature=5), 'temperature'), (dict(n=3), 'n'), (dict(max_tokens=0), 'max_tokens'),
                       (dict(extra_body=dict(tempo=1)), 'tempo'), (dict(prompt=['a', 'b']), 'prompt')):
        with pytest.raises(openai.BadRequestError) as e: ask(**bad)
        assert e.value.param==param and e.value.type=='invalid_request_error', e.value
    with pytest.raises(openai.NotFoundError): ask(model='gpt-4')
    with pytest.raises(openai.BadRequestError) as e: ask(prompt='x '*600)
    assert e.value.code=='context_length_exceeded'

def test_many_at_once_get_what_each_gets_alone(nano):
    client, qs = nano.client(), [f'What is {a} plus {b}?' for a,b in zip(range(10, 34), range(60, 84))]
    one = lambda q: client.chat.completions.create(**chat(q)).choices[0].message.content
    alone, got = [one(q) for q in qs], {}
    threads = [threading.Thread(target=lambda q=q: got.update({q: one(q)})) for q in qs]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [got[q] for q in qs]==alone

@pytest.mark.parametrize('body,status,param', [
    (b'{', 400, None), (b'[]', 400, None), (b'\xff\xfe', 400, None), (b'['*100000, 400, None),
    (b'{}', 400, 'model'), (dict(model='nano'), 400, 'messages'),
    (dict(model='nano', messages=[dict(role='user', content=3)]), 400, 'messages'),
    (dict(chat('x'), temperature='hot'), 400, 'temperature'),
    (b' '*1_000_001, 413, None), (b' '*5_000_000, 413, None)])
def test_bad_bodies(nano, body, status, param):
    s, e = nano.ask('POST', '/v1/chat/completions', body)
    assert s==status and e['error']['param']==param and e['error']['message'] and 'Traceback' not in json.dumps(e)

def test_chunked_body_over_the_limit(nano):
    c = http.client.HTTPConnection('127.0.0.1', nano.port, timeout=60)
    c.request('POST', '/v1/completions', (b' '*100_000 for _ in range(12)), encode_chunked=True,
              headers={'Transfer-Encoding': 'chunked'})
    assert c.getresponse().status==413
    assert nano.ask('GET', '/health')[0]==200

def test_hosts_and_origins(nano, door):
    assert [nano.ask('GET', '/v1/models', Host=h)[0]
            for h in ('localhost', f'127.0.0.1:{nano.port}', '[::1]:80',
                      'evil.example', 'localhost.evil.example')]==[200]*3+[403]*2
    assert [nano.ask('POST', '/v1/completions', b'', Origin=o)[0]
            for o in (f'http://127.0.0.1:{nano.port}', 'https://evil.example', 'null')]==[400, 403, 403]
    assert [door.ask('GET', '/v1/models', Origin=o)[0] for o in ('https://a.example', 'https://b.example')]==[200, 403]

def test_every_route_but_health_wants_the_token(door):
    for auth in (None, 'Bearer wrong', f'Bearer {TOKEN}x', f'Bearer {TOKEN[:-1]}', TOKEN,
                 'Basic '+base64.b64encode(b'me:wrong').decode()):
        for method, path in (('GET', '/'), ('GET', '/v1/models'), ('GET', '/v1/models/endless'),
                             ('POST', '/v1/chat/completions'), ('POST', '/v1/completions'),
                             ('GET', '/docs'), ('GET', '/nowhere'), ('OPTIONS', '/v1/models')):
            assert door.ask(method, path, Authorization=auth)[0]==401, (path, auth)
        assert door.ask('GET', '/health', Authorization=auth)==(200, dict(status='ok'))
    assert (door.ask('GET', '/')[0]==200 and door.ask(
        'GET', '/', Authorization='Basic '+base64.b64encode(f'me:{TOKEN}'.encode()).decode())[0]==200)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f'http://127.0.0.1:{door.port}/v1', api_key='wrong').models.list()
    assert [m.id for m in door.client().models.list()]==['endless']

def test_full_queue_time_limit_and_clients_that_leave(door):
    a = door.stream(dict(ENDLESS, stream=True))                                 # the only row
    # the only place in the queue, not streaming
    b = socket.create_connection(('127.0.0.1', door.port)); body = json.dumps(ENDLESS)
    b.sendall(f'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n'
              f'Content-Length: {len(body)}\r\n\r\n{body}'.encode())
    time.sleep(.5)
    with pytest.raises(openai.RateLimitError) as e: door.client().completions.create(**ENDLESS)
    assert e.value.code=='queue_full' and e.value.response.headers['retry-after']
    # the one who waited leaves: a place in the queue
    b.close(); time.sleep(.3)
    short = dict(ENDLESS, max_tokens=3); got = []
    t = threading.Thread(target=lambda: got.append(door.client().completions.create(**short).usage.completion_tokens))
    t.start(); time.sleep(.3)
    assert got==[]                                                              # waits for the row
    # the one who was answered leaves: the row comes free, long before its time limit
    a.answer.close(); a.close(); t.join(2)
    assert got==[3]
    started = time.time()
    with pytest.raises(openai.APIStatusError) as e: door.client().completions.create(**ENDLESS)
    assert e.value.status_code==504 and 2 < time.time()-started < 30
    with pytest.raises(openai.APIError, match='time limit'):
        list(door.client().completions.create(**ENDLESS, stream=True))
    assert door.client().completions.create(**short).usage.completion_tokens==3

class Browser:
    "A headless chromium, spoken to through its debugging port"
    def __init__(self, folder):
        websocket = pytest.importorskip('websocket', reason='websocket-client is not installed')
        exe = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
        if not exe: pytest.skip('no chromium on this machine')
        flags = ('--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking '
                 '--disable-component-update --disable-sync --window-size=900,700').split()
        self.p = subprocess.Popen([exe, *flags, '--remote-debugging-port=0', f'--user-data-dir={folder}',
                                   'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end, port = time.time()+60, Path(folder)/'DevToolsActivePort'
        while not (port.exists() and port.read_text().count('\n')):
            assert time.time()<end and self.p.poll() is None, 'chromium did not start'
            time.sleep(.1)
        c = http.client.HTTPConnection('127.0.0.1', int(port.read_text().split()[0])); c.request('GET', '/json')
        pages = json.loads(c.getresponse().read())
        self.ws, self.n, self.seen = websocket.create_connection(
            next(p for p in pages if p['type']=='page')['webSocketDebuggerUrl'],
            timeout=30, suppress_origin=True), 0, []
        for d in ('Page', 'Runtime', 'Network', 'Log'): self.do(f'{d}.enable')
    def do(self, method, **params):
        self.n += 1; self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            m = json.loads(self.ws.recv())
            if m.get('id')==self.n: assert 'error' not in m, m; return m['result']
            self.seen.append(m)
    def js(self, code):
        return self.do('Runtime.evaluate', expression=code, returnByValue=True,
                       awaitPromise=True)['result'].get('value')
    def until(self, code, seconds=20):
        end = time.time()+seconds
        while not (v := self.js(code)):
            assert time.time()<end, (code, self.js('document.body.innerText'))
            time.sleep(.05)
        return v
    def close(self): self.p.terminate(); self.p.wait(20)

def test_chat_page_in_a_browser(nano, tmp_path):
    b = Browser(tmp_path/'profile')
    try:
        b.do('Page.navigate', url=f'http://127.0.0.1:{nano.port}/')
        b.until("document.getElementById('model')?.textContent=='nano'")
        send = lambda text: b.js(f"document.getElementById('text').value = {json.dumps(text)}; "
                                 "document.getElementById('form').requestSubmit()")
        wait = lambda n: b.until(f"document.querySelectorAll('.assistant').length=={n} && "
                                 "!document.getElementById('send').disabled && "
                                 "'_' + [...document.querySelectorAll('.assistant')].at(-1).textContent")[1:]
        send('What is 12 plus 30?')
        assert wait(1)==nano.client().chat.completions.create(**chat('What is 12 plus 30?')).choices[0].message.content
        evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'; send(evil); wait(2)
        assert (b.js("document.querySelectorAll('.user')[1].textContent")==evil
                and b.js("document.querySelectorAll('main img, main script').length")==0
                and b.js('document.title')=='nano')
        # the style was let in by its hash
        assert b.js("getComputedStyle(document.querySelector('.user')).whiteSpace")=='pre-wrap'
        b.js("document.getElementById('temperature').value = 9"); send('Hi')
        b.until("document.querySelector('.error')?.textContent.includes(\"'temperature' must be\")")
        if (f := os.environ.get('FLOW2LAB_SCREENSHOT')):
            Path(f).write_bytes(base64.b64decode(b.do('Page.captureScreenshot')['data']))
        b.js("document.getElementById('clear').click()"); assert b.js("document.querySelectorAll('.turn').length")==0
        urls = [m['params']['request']['url'] for m in b.seen if m.get('method')=='Network.requestWillBeSent']
        assert len(urls)>=4 and all(u.startswith((f'http://127.0.0.1:{nano.port}/', 'data:')) for u in urls), urls
        said = [m['params'] for m in b.seen if m.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded')]
        # nothing but the answer we provoked
        assert [s for s in said if '400' not in json.dumps(s)]==[], said
    finally: b.close()

def test_ctrl_c_ends_cleanly_and_nothing_was_written_that_should_not(door, nano):
    answer = door.stream(dict(ENDLESS, stream=True)).answer
    nano.ask('POST', '/v1/completions', dict(model='nano', prompt=SECRET, max_tokens=3))
    for s in (door, nano):
        assert s.stop() in (0, 130)
        said = s.out.read_text() + s.err.read_text()
        assert 'Traceback' not in said and 'rror' not in said, said[-2000:]
        assert not any(w in said for w in (TOKEN, HF, SECRET))
    assert b'the server stops' in answer.read()               # and who was being answered was told

@pytest.mark.parametrize('args,env,says', [
    (['nano', '--host', '0.0.0.0'], {}, 'needs a token'),
    (['nano', '--host', '::'], dict(FLOW2LAB_TOKEN=' '), 'needs a token'),
    (['nanoo'], {}, 'nanoo'), (['nano', '--rows', '0'], {}, '--rows 0'),
    (['nano', '--allow-origin', 'a.example'], {}, 'an origin looks like')])
def test_refuses_to_start(args, env, says):
    r = subprocess.run([sys.executable, '-c', MAIN, 'serve', *args, '--port', '0'],
                       cwd=ROOT, capture_output=True, text=True, timeout=120,
                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_ENDPOINT': 'http://127.0.0.1:9', **env})
    assert r.returncode==2 and says in r.stderr and 'Traceback' not in r.stderr, r.stderr[-800:]

def test_chat_in_the_terminal():
    r = subprocess.run([sys.executable, '-c', MAIN, 'chat', 'nano'], cwd=ROOT, capture_output=True, text=True,
                       timeout=120, input='What is 12 plus 30?\n\nWhat is 81 plus 18?\n',
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (r.returncode==0 and len([l for l in r.stdout.splitlines() if l.strip().isdigit()])==2
            and 'Traceback' not in r.stderr), (r.stdout, r.stderr[-800:])
