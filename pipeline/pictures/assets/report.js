document.querySelectorAll('table.sortable').forEach(function(table){
  var body=table.tBodies[0],rows=Array.from(body.rows),
      box=table.parentNode.classList.contains('wide')?table.parentNode.parentNode:table.parentNode,
      filter=box.querySelector('input'),only=box.querySelector('select'),found=box.querySelector('.found');
  Array.from(table.tHead.rows[0].cells).forEach(function(cell,k){
    cell.querySelector('button').addEventListener('click',function(){
      var up=cell.getAttribute('aria-sort')!=='ascending';
      Array.from(table.tHead.rows[0].cells).forEach(function(c){c.removeAttribute('aria-sort');});
      cell.setAttribute('aria-sort',up?'ascending':'descending');
      rows.sort(function(a,b){
        var x=a.cells[k].textContent,y=b.cells[k].textContent,n=parseFloat(x)-parseFloat(y);
        return (isNaN(n)?x.localeCompare(y):n)*(up?1:-1);});
      rows.forEach(function(r){body.appendChild(r);});});});
  function show(){var left=0;rows.forEach(function(r){
    r.hidden=(filter&&filter.value&&r.textContent.toLowerCase().indexOf(filter.value.toLowerCase())<0)||
      (only&&only.value==='wrong'&&!r.querySelector('.wrong'));left+=r.hidden?0:1;});
    if(found){found.textContent=left+' of '+rows.length;}}
  if(filter){filter.addEventListener('input',show);}
  if(only){only.addEventListener('change',show);}
  show();});
(function(){
  var large=document.getElementById('large'),picture=document.getElementById('picture'),file=document.getElementById('file');
  if(large){document.querySelectorAll('a.large').forEach(function(link){
    link.addEventListener('click',function(event){
      event.preventDefault();
      var small=link.querySelector('img'),own=link.getAttribute('href');
      picture.replaceChildren(small.cloneNode());
      file.href=own;file.hidden=own.indexOf('data:')===0;
      large.showModal();});});
  document.getElementById('shut').addEventListener('click',function(){large.close();});
  large.addEventListener('click',function(event){if(event.target===large){large.close();}});}
  document.querySelectorAll('button.copy').forEach(function(button){
    button.addEventListener('click',function(){
      var text=document.getElementById(button.dataset.of),range=document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();getSelection().addRange(range);
      function done(){button.textContent='copied';}
      function old(){if(document.execCommand('copy')){done();}else{button.textContent='selected: copy it';}}
      if(navigator.clipboard){navigator.clipboard.writeText(text.textContent).then(done,old);}else{old();}});});
  var only=document.getElementById('onlymistakes');
  if(only){only.addEventListener('change',function(){
    document.querySelectorAll('.gallery figure').forEach(function(f){
      f.hidden=only.checked&&!f.classList.contains('mistake');});});}
})();
